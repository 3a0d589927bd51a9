"""Gathers rows of keys and values for a variable-length call, and sums their gradients without atomics.

Shape suffixes: R rows of the pack, P gathered rows, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.packs.attention_plan import VarlenGroup


def gather_rows(x_RKH: Tensor, group: VarlenGroup) -> Tensor:
    """[P, K, H], the rows that `group.kv_index` names: a view where they are a range, else a copy.

    Equal inputs give equal bits of the gradient on any device; it is summed in fp32 and rounded once.
    """
    assert len(x_RKH) == group.num_rows, "rows of another plan"
    if group.first_row is not None:
        return x_RKH.narrow(0, group.first_row, len(group.kv_index))
    gathered: Tensor = _GatherRows.apply(x_RKH, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    """index_select with its own backward pass; PyTorch's is an index_add: atomic adds on a GPU, rounded to bf16."""

    @staticmethod
    def forward(ctx: Any, x_RKH: Tensor, group: VarlenGroup) -> Tensor:
        ctx.group = group
        return x_RKH.index_select(0, group.kv_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PKH: Tensor) -> tuple[Tensor, None]:
        """[R, K, H]: each row's gradient, summed over the places that the row was copied to, in rising order."""
        positions, starts = ctx.group.occurrences
        # One kernel: a thread walks through the bag of its value and sums in fp32.
        sums_RC = F.embedding_bag(
            positions, gradient_PKH.flatten(1), starts, mode="sum", include_last_offset=True
        )
        return sums_RC.view(-1, *gradient_PKH.shape[1:]), None
