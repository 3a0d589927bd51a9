"""Several products with one input as one product: x [a; b]^T in place of x a^T and x b^T.

The weights stay separate parameters, as checkpoints, Muon and published names know them; only the product sees them
as one matrix. They are neighbours in DeepSpeed's flat buffers, so nothing is copied.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def stacked(*linears: nn.Module) -> Tensor:
    """The linears' weights stacked by rows, [sum of the rows, columns], with gradients to each. Weights that are
    neighbours in memory are not copied."""
    joined: Tensor = _Stacked.apply(*[linear.weight for linear in linears])
    return joined


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.num_rows = [len(weight) for weight in weights]
        if not all(_follows(*pair) for pair in pairwise(weights)):
            return torch.cat(weights)
        return weights[0].detach().as_strided((sum(ctx.num_rows), weights[0].shape[1]), weights[0].stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return torch.split(gradients[0], ctx.num_rows)


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins in memory where `first` ends."""
    return bool(
        first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
