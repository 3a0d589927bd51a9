"""Tensors from the host to the device: all of a batch in one copy, from pinned memory.

A copy from other memory waits until the GPU has nothing left to do, and every copy and every pinned block costs the
thread that asks for it some 10 us; a pack holds dozens of tensors. So a batch is laid out in one block of pinned bytes
(by the thread that reads ahead), copied whole, and seen on the device through views.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

TreeT = TypeVar("TreeT")
"""A tensor, a dataclass, a tuple or list of these, or anything else, which is kept as it is."""
ATOMS = (int, float, str, type(None))
"""Hold no tensor. Lengths of segments are long tuples of them: not to be walked item by item."""
ALIGNMENT = 256
"""Bytes; what a tensor of its own on a GPU would have, and every kernel reads from."""


def to_device(tree: TreeT, device: torch.device) -> TreeT:
    """`tree` with every tensor on `device`; to a GPU in one copy, which nothing waits for.

    The block that is copied from may be dropped at once: PyTorch gives pinned memory to nobody else before the copies
    that were asked of it are done. What a dataclass has cached beside its fields goes along. Where nothing is to be
    moved, it is `tree` itself.
    """
    tensors = _tensors(tree)
    if all(x.device == device for x in tensors):
        return tree
    if device.type != "cuda":
        return _rebuilt(tree, [x.to(device) for x in tensors])
    on_host = [x for x in tensors if x.device.type == "cpu"]
    block = _shared_block(on_host)
    if block is None:
        block = _fill(on_host)
    views = iter(_views(block.to(device, non_blocking=True), on_host))
    return _rebuilt(tree, [next(views) if x.device.type == "cpu" else x.to(device) for x in tensors])


def pinned(tree: TreeT) -> TreeT:
    """`tree` with its tensors in one block of pinned memory, as `to_device` copies it; where no GPU is in use, `tree`.

    For the thread that makes batches: it spares the one that trains the work. All tensors must be on the CPU.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return tree
    tensors = _tensors(tree)
    return _rebuilt(tree, _views(_fill(tensors), tensors))


def pinned_bytes(count: int) -> Tensor:
    """An uninitialised block, uint8 [count]."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def _fill(tensors: Sequence[Tensor]) -> Tensor:
    block = pinned_bytes(_layout(tensors)[1])
    for view, tensor in zip(_views(block, tensors), tensors, strict=True):
        view.copy_(tensor)
    return block


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """First byte of each tensor, and the bytes of all."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def _views(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of the shapes and types of `tensors`, row-major, on the device of the block."""
    starts, _ = _layout(tensors)
    typed = {dtype: block.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    return [
        typed[tensor.dtype].as_strided(tensor.shape, _strides(tensor.shape), start // tensor.itemsize)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def _shared_block(tensors: Sequence[Tensor]) -> Tensor | None:
    """The block that `pinned` laid these tensors out in; None: they lie elsewhere."""
    starts, size = _layout(tensors)
    if not tensors or not tensors[0].is_pinned():
        return None
    storage = tensors[0].untyped_storage()
    if storage.nbytes() != size:
        return None
    for start, tensor in zip(starts, tensors, strict=True):
        is_here = tensor.untyped_storage().data_ptr() == storage.data_ptr()
        if not is_here or tensor.storage_offset() * tensor.itemsize != start or not tensor.is_contiguous():
            return None
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(tree: object) -> list[Tensor]:
    """In the order of what a dataclass holds and of items."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: object, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif dataclasses.is_dataclass(tree):
        for value in vars(tree).values():
            _collect(value, found)
    elif isinstance(tree, tuple | list):
        for item in tree:
            if not isinstance(item, ATOMS):
                _collect(item, found)


def _rebuilt(tree: TreeT, tensors: Sequence[Tensor]) -> TreeT:
    """`tree` with `tensors` in place of its own, in the order of `_tensors`."""
    return cast(TreeT, _replaced(tree, iter(tensors)))


def _replaced(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(tree):
        new = object.__new__(type(tree))  # not replace(): fields need not be arguments, nor be checked again
        vars(new).update({name: _replaced(value, tensors) for name, value in vars(tree).items()})
        return new
    if isinstance(tree, tuple | list) and not all(isinstance(item, ATOMS) for item in tree):
        items = [_replaced(item, tensors) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
