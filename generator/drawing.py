"""What every drawing of latents shares: guided times and noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_guided(t: float, interval: tuple[float, float]) -> bool:
    """Whether `t` lies above the first and up to the second time of the interval (Kynkäänniemi et al. 2024)."""
    low, high = interval
    return low < min(t, 1.0) <= high  # rounding may lift a shifted 1 above 1


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draws one image of standard normal noise from each seed, fp32 [len(seeds), *shape] on the CPU."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
