"""Runs and measures every phase of a training once, for launch/preflight.py --execute.

The phases are the loop's own methods (engine/loop.py), so a change of the loop needs no change here.
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
    """A phase does not fit into memory."""


@dataclass(frozen=True)
class PhasePeak:
    """Duration and peaks of one phase, each the highest of all ranks."""

    name: str
    seconds: float
    tensors: int
    """Bytes of tensors: allocated on a GPU, counted on a CPU (engine/memory.py)."""
    process: int
    """Bytes that the allocator reserved on a GPU; on a CPU, resident bytes of the process, interpreter included."""


class Meter:
    """Measures phases. On a CPU, only tensors made inside `with meter:` are counted.

    Attributes: `peaks`: one entry a phase so far; `forgets`: whether each phase has its own resident peak (Linux).
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
        """Measures the block as phase `name`. Collective. Raises OutOfMemoryError: the phase does not fit."""
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
    """Takes a first step and one for each name in `steps`; then runs EMA, samples, evaluation, save, load and export.

    `evaluate` builds the evaluation; None: no evaluation is run. The first step is a phase of its own: optimizer states
    are allocated at its end, so it needs less memory than the later steps. `config.steps` must be `len(steps) + 1`.
    Raises OutOfMemoryError.
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
            run.train()  # all steps are done, so this only exports
    return meter
