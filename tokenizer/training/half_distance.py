"""LPIPS's normalisation and distance of bf16 feature maps, without an fp32 copy of a map.

Both functions have hand-written gradients. Under autograd the length of a cell is an fp32 number, and every product
with it becomes an fp32 map. Here maps are read and written in bf16, kernels compute in fp32 inside, and sums over
channels and pixels accumulate in fp32. Maps keep their memory format.

Shapes: B batch, C channels, H W feature cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit(x_BCHW: Tensor, eps: float) -> Tensor:
    """x / (|x| + eps) per cell, in the dtype of x; a cell that is all 0 stays 0, with a finite gradient."""
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return _Unit.apply(x_BCHW, eps)  # type: ignore[no-any-return]


def distance(a_BCHW: Tensor, b_BCHW: Tensor, weight_1C11: Tensor) -> Tensor:
    """mean over H, W of sum over C of weight (a - b)^2, [B] fp32; differentiable towards a alone."""
    with torch.autocast(a_BCHW.device.type, enabled=False):
        return _Distance.apply(a_BCHW, b_BCHW, weight_1C11)  # type: ignore[no-any-return]


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, eps: float) -> Tensor:
        length_B1HW = torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True, dtype=torch.float32)
        inverse_B1HW = (length_B1HW + eps).reciprocal()
        unit_BCHW = torch.mul(x_BCHW, inverse_B1HW, out=torch.empty_like(x_BCHW))
        ctx.save_for_backward(unit_BCHW, inverse_B1HW)
        return unit_BCHW

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: Tensor) -> tuple[Tensor, None]:
        """(g - (g . u) u) / |x|; eps is far below what bf16 resolves of |x|."""
        unit_BCHW, inverse_B1HW = ctx.saved_tensors
        with torch.autocast(unit_BCHW.device.type, enabled=False):
            along_B1HW = (gradient_BCHW * unit_BCHW).sum(dim=1, keepdim=True, dtype=torch.float32)
            across = torch.empty_like(unit_BCHW)
            torch.addcmul(gradient_BCHW, unit_BCHW, along_B1HW, value=-1, out=across)
            return torch.mul(across, inverse_B1HW, out=across), None


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_BCHW: Tensor, b_BCHW: Tensor, weight_1C11: Tensor) -> Tensor:
        difference_BCHW = a_BCHW - b_BCHW
        ctx.save_for_backward(difference_BCHW, weight_1C11)
        weighted = torch.empty_like(difference_BCHW)
        torch.mul(difference_BCHW.square(), weight_1C11, out=weighted)
        return weighted.sum(dim=1, dtype=torch.float32).mean(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None, None]:
        difference_BCHW, weight_1C11 = ctx.saved_tensors
        cells = difference_BCHW[0, 0].numel()
        with torch.autocast(difference_BCHW.device.type, enabled=False):
            scale_BC11 = weight_1C11 * (gradient_B.view(-1, 1, 1, 1) * (2.0 / cells))
            result = torch.mul(difference_BCHW, scale_BC11, out=torch.empty_like(difference_BCHW))
        return result, None, None
