"""Exponential moving averages of the weights: fp32, on this rank's master shards, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine import deepspeed_engine


class Ema:
    """`shadow <- shadow + (1 - d) (weights - shadow)` after every optimizer step, for each requested decay.

    d = min(decay, (1 + step) / (10 + step)), so that the initial weights do not dominate short runs and early steps.
    It costs 4 bytes a parameter and decay, divided by the number of ranks. `shadows`: by decay, in the requested order,
    shards as `deepspeed_engine.shards` gives them.
    """

    def __init__(self, engine: Any, decays: Sequence[float]) -> None:
        self.shadows: dict[float, list[Tensor]] = {
            decay: [shard.detach().clone() for shard in deepspeed_engine.shards(engine)] for decay in decays
        }

    @torch.no_grad()
    def update(self, engine: Any, step: int) -> None:
        """Adds the weights after optimizer step number `step` (from 0) to every average."""
        for decay, shadow in self.shadows.items():
            weight = 1.0 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(shadow, deepspeed_engine.shards(engine), weight)
