"""Differentiable augmentation of the discriminator's inputs (Zhao et al. 2020): colour, translation.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_SHIFT = 1 / 8
"""Largest translation, as a share of the side."""


def augment(pixels_01: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts brightness, saturation and contrast of every image, then translates it; probability 1.

    pixels_01: [B, 3, H, W], differentiable; the result may leave [0, 1]. Pixels shifted in from outside are
    the mid-grey that is zero in [-1, 1], the range in which the method is defined.
    """
    pixels_pm1 = 2.0 * pixels_01 - 1.0
    brightness, saturation, contrast = torch.rand(
        3, len(pixels_01), 1, 1, 1, generator=generator, device=pixels_01.device
    )
    pixels_pm1 = pixels_pm1 + (brightness - 0.5)
    grey = pixels_pm1.mean(dim=1, keepdim=True)
    pixels_pm1 = (pixels_pm1 - grey) * (2.0 * saturation) + grey
    mean = pixels_pm1.mean(dim=(1, 2, 3), keepdim=True)
    pixels_pm1 = (pixels_pm1 - mean) * (contrast + 0.5) + mean
    return 0.5 * (translate(pixels_pm1, _shifts(pixels_pm1, generator)) + 1.0)


def translate(pixels: Tensor, shifts_B2: Tensor) -> Tensor:
    """Moves image b down by shifts[b, 0] and right by shifts[b, 1] pixels (int64), filling with zeros."""
    return _Translate.apply(pixels, shifts_B2)  # type: ignore[no-any-return]


class _Translate(torch.autograd.Function):
    """Translation whose backward is the opposite translation.

    Autograd's own backward of a gather adds with atomics on CUDA, so a resumed run would not repeat bit for
    bit.
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, shifts_B2: Tensor) -> Tensor:
        ctx.save_for_backward(shifts_B2)
        return _shifted(pixels, shifts_B2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (shifts_B2,) = ctx.saved_tensors
        return _shifted(gradient, -shifts_B2), None


def _shifted(pixels: Tensor, shifts_B2: Tensor) -> Tensor:
    B, _, H, W = pixels.shape
    row_BH1 = torch.arange(H, device=pixels.device).view(1, H, 1) - shifts_B2[:, 0].view(B, 1, 1)
    column_B1W = torch.arange(W, device=pixels.device).view(1, 1, W) - shifts_B2[:, 1].view(B, 1, 1)
    inside_B1HW = ((row_BH1 >= 0) & (row_BH1 < H) & (column_B1W >= 0) & (column_B1W < W))[:, None]
    source_B1P = (row_BH1.clamp(0, H - 1) * W + column_B1W.clamp(0, W - 1)).view(B, 1, H * W)
    moved = pixels.flatten(2).gather(2, source_B1P.expand(-1, pixels.shape[1], -1)).view_as(pixels)
    return moved * inside_B1HW


def _shifts(pixels: Tensor, generator: torch.Generator) -> Tensor:
    unit_B2 = torch.rand(len(pixels), 2, generator=generator, device=pixels.device)
    limits = [
        round(side * MAX_SHIFT) for side in pixels.shape[2:]
    ]  # Python numbers, because a tensor of them would make the CPU wait for the GPU
    shifts = [(unit * (2 * limit + 1)).long() - limit for unit, limit in zip(unit_B2.T, limits, strict=True)]
    return torch.stack(shifts, dim=1)
