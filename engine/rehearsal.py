"""Every phase of a training once, each measured by itself: what launch/preflight.py --execute runs.

The loop's own parts in the loop's own order (engine/loop.py), so nothing here has to be kept like it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from base.config import UserError
from base.objective import BatchSource, Evaluation, Objective
from engine.distributed import Ranks
from engine.engine_config import EngineConfig
from engine.loop import _Run
from engine.memory import TensorBytes, asked_for, reset_resident_peak, resident_peak_bytes


class OutOfMemoryError(UserError):
    """A phase that does not fit."""


@dataclass(frozen=True)
class PhasePeak:
    """One phase on the fullest rank."""

    name: str
    seconds: float
    tensors: int
    """Bytes of tensors: allocated on a GPU, counted on a CPU (engine/memory.py)."""
    process: int
    """Bytes that the allocator reserved on a GPU; resident in memory on a CPU, the interpreter's included."""


class Meter:
    """Measures phases. On a CPU all tensors must be made inside `with meter:` to be counted.

    Attributes: `peaks`, of the phases so far; `forgets`, whether every phase has a resident peak of its own (Linux).
    """

    def __init__(self, ranks: Ranks) -> None:
        self.peaks: list[PhasePeak] = []
        self.forgets = True
        self._ranks = ranks
        self._on_gpu = ranks.device.type == "cuda"
        self._counted = TensorBytes()
        self._stack = ExitStack()

    def __enter__(self) -> Meter:
        if not self._on_gpu:
            self._stack.enter_context(self._counted)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The block is phase `name`. Collective. Raises OutOfMemoryError naming it."""
        self._ranks.barrier()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._ranks.device)
        else:
            self._counted.reset_peak()
            self.forgets &= reset_resident_peak()
        begin_s = time.monotonic()
        try:
            yield
            if self._on_gpu:
                torch.cuda.synchronize(self._ranks.device)
        except (RuntimeError, MemoryError) as error:
            asked = asked_for(error)
            if asked is None:
                raise
            raise OutOfMemoryError(f"out of memory in phase '{name}': {asked}") from error
        seconds, (tensors, process) = time.monotonic() - begin_s, self._bytes()
        fullest = [
            max(values) for values in zip(*self._ranks.gather((seconds, tensors, process)), strict=True)
        ]
        self.peaks.append(PhasePeak(name, *fullest))

    def _bytes(self) -> tuple[int, int]:
        if self._on_gpu:
            device = self._ranks.device
            return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return self._counted.peak, resident_peak_bytes()


def rehearse(
    build: Callable[[], Objective],
    open_source: Callable[[], BatchSource],
    config: EngineConfig,
    steps: Sequence[str],
    *,
    run_dir: Path,
    ranks: Ranks,
    evaluate: Callable[[Objective], Evaluation] | None = None,
) -> Meter:
    """Trains for a first step and one for each of `steps` (their names); then EMA, samples, save, load, export.

    `evaluate` makes what is run after the samples. The first step is apart: optimizer states are made at its end, so no
    later one is as small. `config.steps` must be one more than `steps`. Raises OutOfMemoryError.
    """
    assert config.steps == 1 + len(steps)
    with Meter(ranks) as meter:
        with meter("data"):
            source = open_source()
        with meter("start"):
            objective = build()
            run = _Run(objective, source, config, run_dir, {}, ranks)
        for name in ("first step", *steps):
            with meter(name):
                run._train_step()
        if run.ema is not None:
            with meter("EMA"):
                run.ema.update(run.engines["main"], run.step)
        with meter("samples"):
            run._write_samples()
        if evaluate is not None:
            with meter("evaluation"):
                run._evaluate(evaluate(objective))
        with meter("save"):
            run._save(last=True)
        with meter("load"):
            run._resume({})
        with meter("export"):
            run.train()  # all steps are done: what is left is the end
    return meter
