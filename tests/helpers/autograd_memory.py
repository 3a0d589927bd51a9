"""The bytes that autograd keeps for a backward pass, with an attention that keeps what a fused kernel keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FlashLike(torch.autograd.Function):
    """Saves what a fused kernel saves: q, k, v, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors[:3])


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], *, autocast: bool) -> int:
    """Bytes of all storages that `forward` saves, without the parameters; `autocast`: in bf16, as on a GPU."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    torch.set_autocast_enabled("cuda", autocast)  # torch.autocast would ask for a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            output = forward()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
