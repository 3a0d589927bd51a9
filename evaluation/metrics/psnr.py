"""Peak signal-to-noise ratio on 8-bit images, the RAE/RPiAE protocol: dB per image, then the mean of dB."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["truncate", "round"]

# Equal images have no finite value. One wrong level in a 256 px image would be 101 dB.
MAX_DB = 100.0


def to_uint8(pixels_01: Tensor, rounding: Rounding = "truncate") -> Tensor:
    """float [..., 3, H, W] -> uint8: clamped to [0, 1], times 255, *truncated* as the RAE evaluation does.

    `round` goes to the nearest level instead: closer by up to half a level, but comparable with no published number.
    """
    levels = pixels_01.float().clamp(0, 1) * 255
    return (levels.round() if rounding == "round" else levels).to(torch.uint8)


def psnr_db(image: Tensor, reference: Tensor, keep: Tensor | None = None) -> Tensor:
    """10 log10(255^2 / mean squared error) of each image, float64 [B], at most MAX_DB.

    `image`, `reference`: uint8 [B, 3, H, W]. `keep`: bool [B, H, W], the pixels that count (None: all); an
    image without such pixels gives nan.
    """
    assert image.dtype == reference.dtype == torch.uint8, "the protocol is defined on 8-bit images"
    assert image.shape == reference.shape and image.ndim == 4
    squared = (image.double() - reference.double()).square().mean(1)
    if keep is None:
        keep = torch.ones_like(squared, dtype=torch.bool)
    mse = (squared * keep).sum((1, 2)) / keep.sum((1, 2))
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=MAX_DB)
