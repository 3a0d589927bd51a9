"""Frozen networks on a GPU: they hold in bf16 what autocast would cast to bf16 at every use.

That is the weights of products, Linear layers and convolutions. Autocast leaves the rest in fp32 (norms, embeddings,
scales), so it stays: a network that holds its products' weights computes the bits of one whose weights are cast.
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
    """What autocast computes products in on a GPU; None without autocast, and on a CPU, whose runs keep their casts."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def products(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of `module` whose weights autocast casts."""
    return (child for child in module.modules() if isinstance(child, PRODUCTS))


def hold(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of `module`'s products, once and for all; those of images' convolutions to channels last."""
    for child in products(module):
        for name, parameter in list(child.named_parameters(recurse=False)):
            cast = parameter.detach().to(dtype)
            if cast.dim() == 4:
                cast = cast.contiguous(memory_format=torch.channels_last)
            child.register_parameter(name, nn.Parameter(cast, requires_grad=False))


def holds(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module`'s products have weights of `dtype`; all have the same one."""
    return all(child.weight.dtype == dtype for child in itertools.islice(products(module), 1))


def hold_under_autocast(module: nn.Module, device: torch.device) -> None:
    """`hold`, where a forward pass on `device` would cast; nothing is left to do from the second one on."""
    dtype = product_dtype(device)
    if dtype is not None and not holds(module, dtype):
        hold(module, dtype)


class Twins:
    """Frozen parts of a model that must keep its fp32 weights, to be exported: each gets a copy that holds bf16."""

    def __init__(self, *, compiled: bool) -> None:
        """compiled: whether the copies' blocks are (a copy of a compiled block is not)."""
        self._compiled = compiled
        self._twins: dict[nn.Module, nn.Module] = {}

    def of(self, part: nn.Module, device: torch.device) -> nn.Module:
        """What computes for `part` in a forward pass on `device`: its twin, or `part` where nothing would be cast.

        The twin is made at the first call, after a checkpoint was read. Under ZeRO-3 `part` has its weights in pieces
        and works itself.
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
