"""Norm layers that compute in the dtype of their input.

Under CUDA's autocast PyTorch's norms run in fp32 and return fp32. Such a norm and the layer after it read, write and
save twice the bytes. PyTorch's kernels sum in fp32 for any input dtype, so the layers here run with autocast off and
cast their weight to the dtype of the activations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of x."""
        with _without_autocast(x):
            return F.rms_norm(x, self.normalized_shape, _as(self.weight, x), self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of x."""
        with _without_autocast(x):
            return F.layer_norm(x, self.normalized_shape, _as(self.weight, x), _as(self.bias, x), self.eps)


class GroupNorm(nn.GroupNorm):
    """LayerNorm of each group of channels, over all positions (Wu and He 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...] in the dtype of x."""
        with _without_autocast(x):
            return F.group_norm(x, self.num_groups, _as(self.weight, x), _as(self.bias, x), self.eps)


def replace_norms(model: nn.Module) -> None:
    """Replaces PyTorch's norms inside `model` by the layers here; parameters and their names stay."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm | nn.GroupNorm) and not isinstance(
                child, LayerNorm | GroupNorm
            ):
                setattr(parent, name, _ours(child))


def _ours(norm: nn.LayerNorm | nn.GroupNorm) -> nn.Module:
    """`norm` as a layer of this file. It gets the parameters themselves, not copies."""
    new: LayerNorm | GroupNorm
    with torch.device("meta"):
        if isinstance(norm, nn.LayerNorm):
            new = LayerNorm(norm.normalized_shape, norm.eps, norm.elementwise_affine, norm.bias is not None)
        else:
            new = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
    new.weight, new.bias = norm.weight, norm.bias
    return new.train(norm.training)


def _as(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off only where it is on, as a context costs 20 microseconds; meta tensors have no autocast."""
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()
