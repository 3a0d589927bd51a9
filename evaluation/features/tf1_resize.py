"""Bilinear resize as TensorFlow 1 did it: the first step of every published FID.

TF1's `resize_bilinear(align_corners=False)` takes output pixel i from input position i * in / out: no
half-pixel centres, no antialiasing, all in fp32. Any other resize moves FID (Parmar et al. 2022).

Shapes: B images, H W input pixels, S output pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resize_tf1(pixels_BCHW: Tensor, size_px: int) -> Tensor:
    """uint8 or float [B, C, H, W] -> float32 [B, C, S, S]; values keep their range."""
    x = pixels_BCHW.float()
    rows_low, rows_high, row_weight = _taps(x.shape[2], size_px, x.device)
    columns_low, columns_high, column_weight = _taps(x.shape[3], size_px, x.device)
    # First along x, then along y, each as a + (b - a) * w: TF's kernel rounds in this order.
    left, right = x[:, :, :, columns_low], x[:, :, :, columns_high]
    x = left + (right - left) * column_weight
    top, bottom = x[:, :, rows_low], x[:, :, rows_high]
    return top + (bottom - top) * row_weight[:, None]


def _taps(num_in: int, num_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of both neighbours, int64 [S], and weight of the second neighbour, float32 [S]."""
    scale = torch.tensor(num_in, dtype=torch.float32, device=device) / num_out
    position = torch.arange(num_out, dtype=torch.float32, device=device) * scale
    low = position.floor()
    high = (low + 1).clamp(max=num_in - 1)
    return low.long(), high.long(), position - low
