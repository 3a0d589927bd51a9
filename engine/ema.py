"""Exponential moving average of the weights: fp32, on this rank's master shards, no communication."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine import masters


class Ema:
    """`shadow <- shadow + (1 - d) (weights - shadow)` after every optimizer step.

    d = min(decay, (1 + step) / (10 + step)): short runs and early steps are not dominated by the initial weights.
    Costs 4 bytes a parameter divided by the number of ranks.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self.shadow: list[Tensor] = [shard.detach().clone() for shard in masters.shards(engine)]

    @torch.no_grad()
    def update(self, engine: Any, step: int) -> None:
        """Takes the weights after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, masters.shards(engine), 1.0 - decay)

    def save(self, path: Path) -> None:
        """Writes this rank's shards."""
        safetensors.torch.save_file({str(i): shard for i, shard in enumerate(self.shadow)}, path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote on the same rank of the same number of ranks."""
        stored = safetensors.torch.load_file(path)
        for index, shard in enumerate(self.shadow):
            shard.copy_(stored[str(index)])
