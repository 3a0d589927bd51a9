"""Flow matching on the linear path between data (t = 0) and noise (t = 1).

Source: Lipman et al. 2023 (conditional flow matching), Esser et al. 2024 (logit-normal timesteps, time
shift), Zheng et al. 2025, RAE (the shift follows the latent's number of values).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from generator.config import TimeShift

SHIFT_BASE_NUMEL = 4096
"""n of s = sqrt(m / n): a latent of this many values needs no shift."""


def resolve_shift(shift: TimeShift, latent_shape: Sequence[int]) -> float:
    """s = sqrt(m / n), m = C * Y * X of one image, n = 4096 (RAE); a given number is the shift itself."""
    if shift == "auto":
        return math.sqrt(math.prod(latent_shape) / SHIFT_BASE_NUMEL)
    return float(shift)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t) (Esser et al., eq. 23): s > 1 moves time towards noise; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def pack_generator(seed: int, device: torch.device) -> torch.Generator:
    """The random generator of a pack's times and noise, on the device that uses them (800,000 values in 12,288 tokens).

    The numbers depend on the pack's seed, not on the rank or the number of ranks. CPU and GPU draw different numbers,
    and so may GPUs of different models.
    """
    return torch.Generator(device).manual_seed(seed)


def draw_times(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """t = shift(sigmoid(n)), n ~ N(0, 1) (Esser et al., eq. 19 with m = 0, s = 1). fp32 [count] in (0, 1), on the
    generator's device.
    """
    normal = torch.randn(count, generator=generator, device=generator.device)
    return shift_time(torch.sigmoid(normal), shift)


def interpolate(z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) z + t eps. `t` broadcasts over `z` and `noise`, which have one shape; t = 0 returns `z`
    exactly."""
    return (1 - t) * z + t * noise


def velocity_target(z: Tensor, noise: Tensor) -> Tensor:
    """v = d x_t / dt = eps - z."""
    return noise - z


def sampling_times(num_steps: int, shift: float) -> list[float]:
    """The shifted grid from 1 (noise) to 0 (data): num_steps + 1 values, equally spaced before the shift."""
    grid = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return [float(value) for value in shift_time(grid, shift)]


def draw_noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Draws one image of standard normal noise from each seed, fp32 [len(seeds), *shape] on the CPU."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
