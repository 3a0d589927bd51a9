"""Metrics between two log lines."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from base.objective import LossOutput
from engine.distributed import Ranks

SUMMED = ("samples", "tokens")
"""Entries of a source's ledger (also NAME/part) that add up over ranks and steps."""
LATEST = ("samples_seen", "samples_pending")
"""Entries that add up over ranks, with their value at the last step. All other entries are averaged."""


class Window:
    """Sums of metrics since the last log line. Values stay on the device until `read`."""

    def __init__(self, ranks: Ranks, peak_flops: float | None = None) -> None:
        """`peak_flops`: peak FLOP/s of one device; None: unknown, so no MFU is computed."""
        self._ranks = ranks
        self._peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._counts: dict[str, float] = {}
        self._source: dict[str, float] = {}
        self._seconds = 0.0
        self._num_steps = 0
        self._flops = 0.0

    def add(self, prefix: str, output: LossOutput, weight: float) -> None:
        """Adds one micro-batch's sums times `weight`; `prefix` names the engine or the term of the loss."""
        self._flops += output.flops * weight
        for name, value in {"loss": output.loss_sum.detach(), **output.metrics}.items():
            term = value.float() * weight
            known = self._sums.get((prefix, name))
            self._sums[prefix, name] = term if known is None else known + term

    def close_step(
        self, counts: Mapping[str, float], source_metrics: Mapping[str, float], seconds: float
    ) -> None:
        """Adds a step's global counts by prefix, the source's ledger and the step's duration."""
        self._num_steps += 1
        self._seconds += seconds
        for prefix, count in counts.items():
            self._counts[prefix] = self._counts.get(prefix, 0.0) + count
        for name, value in source_metrics.items():
            before = 0.0 if name in LATEST else self._source.get(name, 0.0)
            self._source[name] = before + value

    def read(self) -> dict[str, float]:
        """Means per unit over the window and all ranks, the ledger and rates; starts a new window. Collective.

        A term of the loss (or an adversary) without units in the window has no mean: its names are absent.
        """
        keys = sorted(self._sums)
        totals = self._ranks.sum_on_device(torch.stack([self._sums[key] for key in keys])).tolist()
        values = {
            prefix + name: total / max(self._counts[prefix], 1.0)
            for (prefix, name), total in zip(keys, totals, strict=True)
            if self._counts[prefix] or not prefix
        }
        values["step_s"] = self._seconds / self._num_steps
        ledger = self._ranks.sum(list(self._source.values()))
        for name, total in zip(self._source, ledger, strict=True):
            if name.partition("/")[0] in SUMMED:
                values[name] = total
                values[f"{name}_per_s"] = total / self._seconds
            elif name in LATEST:
                values[name] = total
            else:
                values[name] = total / (self._num_steps * self._ranks.world)
        (flops,) = self._ranks.sum([self._flops])
        if flops:
            per_s = flops / self._seconds / self._ranks.world
            values["tflops_per_s"] = per_s / 1e12
            if self._peak_flops:
                values["mfu"] = per_s / self._peak_flops
        self._reset()
        return values
