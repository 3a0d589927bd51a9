"""Puts the averaged weights into the model to draw samples, to evaluate and to export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from base import files
from base.objective import Objective
from engine import deepspeed_engine
from engine.distributed import Ranks
from engine.ema import Ema
from engine.engine_config import EngineConfig


class Averages:
    """The averaged weights of one training, or its last weights if it keeps no average. Every method is collective."""

    def __init__(
        self, objective: Objective, engine: Any, ema: Ema | None, config: EngineConfig, ranks: Ranks
    ) -> None:
        """`engine`: the main engine, whose weights `ema` averages."""
        self._objective, self._engine, self._ema = objective, engine, ema
        self._config, self._ranks = config, ranks

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model holds whole averaged weights, in eval mode."""
        self._objective.model.eval()
        with self._in_place(), deepspeed_engine.gathered(self._engine), torch.no_grad():
            yield
            self._ranks.barrier()
        self._objective.model.train()

    def samples(self) -> npt.NDArray[np.uint8] | None:
        """The objective's grid, on the first rank. Under ZeRO-3 every rank computes: forward is collective there."""
        grid = None
        with self.whole():
            if self._ranks.is_first or self._config.zero_stage == 3:
                with deepspeed_engine.autocast(self._config.precision, self._ranks.device):
                    grid = self._objective.samples()
        return grid

    def export(self, directory: Path, decay: float | None) -> str:
        """Writes the average of `decay` (None: the first decay). Returns, on every rank, why that failed, or ''."""
        problem = ""
        with self._in_place(decay), deepspeed_engine.collected(self._engine, self._ranks.is_first):
            if self._ranks.is_first:
                try:
                    # `directory` lies in the run's folder, which the training claimed at its start.
                    with files.directory(directory, lambda _: True) as temporary:
                        self._objective.export(temporary)
                except OSError as error:
                    problem = f"{directory} cannot be written: {files.reason(error)}"
            return str(self._ranks.gather(problem)[0])

    def _in_place(self, decay: float | None = None) -> contextlib.AbstractContextManager[None]:
        if self._ema is None:
            return contextlib.nullcontext()
        return deepspeed_engine.swapped(self._engine, self._ema.shadows[decay or self._config.ema_decays[0]])
