"""Structural similarity on 8-bit images (Wang et al. 2004), the RAE/RPiAE protocol.

The definition is that of torchmetrics 1.9: borders are reflected and *count* in the mean. Before torchmetrics' change
#2721 (September 2024; 1.4.0 lacks it), and in scikit-image, a border of 5 px is left out, which gives other scores.
The definition stands here so that it does not move with an installed version; tests/parity compares.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW_SIGMA_PX = 1.5
WINDOW_PX = 11
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Mean of the SSIM map over channels and pixels, float64 [B], at most 1.

    `image`, `reference`: uint8 [B, 3, H, W]. Images of less than 6 px have no reflected border and give nan.
    """
    assert image.dtype == reference.dtype == torch.uint8, "the protocol is defined on 8-bit images"
    assert image.shape == reference.shape and image.ndim == 4
    if min(image.shape[2:]) <= WINDOW_PX // 2:
        return torch.full((len(image),), math.nan, dtype=torch.float64)
    # One image at a time stays in the processor's cache: several times as fast as 32 images of 256 px together.
    return torch.stack([_ssim_of_one(*pair) for pair in zip(image, reference, strict=True)])


def _ssim_of_one(image_CHW: Tensor, reference_CHW: Tensor) -> Tensor:
    """SSIM of one image, uint8 [3, H, W] -> scalar, float64."""
    # fp64: in flat areas the variances below are differences of nearly equal numbers, beside C2 = 9e-4.
    x, y = image_CHW.double() / 255, reference_CHW.double() / 255
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = (_blur(x * x) - mean_x**2).clamp(min=0)
    variance_y = (_blur(y * y) - mean_y**2).clamp(min=0)
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean()


def _blur(x_CHW: Tensor) -> Tensor:
    """Gaussian mean over WINDOW_PX x WINDOW_PX, borders reflected; separable."""
    border = WINDOW_PX // 2
    offsets = torch.arange(-border, border + 1, dtype=x_CHW.dtype)
    weights = torch.exp(-((offsets / WINDOW_SIGMA_PX) ** 2) / 2)
    weights = weights / weights.sum()
    x = F.pad(x_CHW, (border,) * 4, mode="reflect")
    for dim in (1, 2):
        length = x.shape[dim] - 2 * border
        total = torch.zeros_like(x.narrow(dim, 0, length))
        for start, weight in enumerate(weights.tolist()):
            total.add_(x.narrow(dim, start, length), alpha=weight)
        x = total
    return x
