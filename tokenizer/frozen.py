"""Frozen networks on a GPU keep in bf16 the weights that autocast would cast to bf16 at every use.

Such weights belong to products: Linear layers and convolutions. Autocast leaves norms, embeddings and scales in fp32,
and so do these functions. A network with bf16 products computes bit for bit what it computes under autocast.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from tokenizer.blocks import compile_blocks

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def product_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast's products on a GPU; None without autocast, and on a CPU (weights are cast at each use)."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def products(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of `module` whose weights autocast casts."""
    return (child for child in module.modules() if isinstance(child, PRODUCTS))


def hold(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of `module`'s products in place, for good; those of 2-D convolutions become channels-last."""
    for child in products(module):
        for name, parameter in list(child.named_parameters(recurse=False)):
            cast = parameter.detach().to(dtype)
            if cast.dim() == 4:
                cast = cast.contiguous(memory_format=torch.channels_last)
            child.register_parameter(name, nn.Parameter(cast, requires_grad=False))


def holds(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module`'s products have weights of `dtype`, judged by the first one: `hold` casts all."""
    return all(child.weight.dtype == dtype for child in itertools.islice(products(module), 1))


def hold_under_autocast(module: nn.Module, device: torch.device) -> None:
    """Calls `hold` if a forward pass on `device` would cast weights; further calls do nothing."""
    dtype = product_dtype(device)
    if dtype is not None and not holds(module, dtype):
        hold(module, dtype)


class Twins:
    """bf16 copies of a model's frozen parts. The model keeps its fp32 weights, which it exports."""

    def __init__(self, *, compiled: bool) -> None:
        """compiled: whether to compile the copies' blocks (a copy of a compiled block is uncompiled)."""
        self._compiled = compiled
        self._twins: dict[nn.Module, nn.Module] = {}

    def of(self, part: nn.Module, device: torch.device) -> nn.Module:
        """The module that computes for `part` on `device`: its bf16 twin, or `part` itself if autocast casts nothing.

        The first call makes the twin, so call after the checkpoint is read. Under ZeRO-3 `part` holds only pieces of
        its weights and has no twin.
        """
        dtype = product_dtype(device)
        if dtype is None or holds(part, dtype) or any(p.numel() == 0 for p in part.parameters()):
            return part
        if part not in self._twins:
            twin = copy.deepcopy(part)
            hold(twin, dtype)
            if self._compiled:
                compile_blocks(twin)
            self._twins[part] = twin
        return self._twins[part]
