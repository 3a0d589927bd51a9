"""Moves a batch's tensors from the host to the device in one copy, from pinned memory.

A copy from pageable memory waits until the GPU is idle, and every copy and every pinned block costs the calling thread
some 10 us; a pack holds dozens of tensors. So the prefetch thread lays a batch out in one block of pinned bytes, the
block is copied whole, and the tensors on the device are views of the copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

TreeT = TypeVar("TreeT")
"""A tensor, a dataclass, or a tuple or list of trees. Anything else is kept as it is."""
ATOMS = (int, float, str, type(None))
"""Types without tensors. Lengths of segments are long tuples of these, which are not rebuilt item by item."""
ALIGNMENT = 256
"""Alignment of each tensor in the block, in bytes: that of a separate GPU tensor, on which kernels may rely."""


def to_device(tree: TreeT, device: torch.device) -> TreeT:
    """`tree` with every tensor on `device`; to a GPU in one asynchronous copy.

    The caller may drop the pinned block at once: PyTorch does not reuse pinned memory before its copies are done.
    Cached properties of a dataclass are moved, too. Returns `tree` itself if all tensors are on `device` already.
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
    """`tree` with its tensors in one block of pinned memory, which `to_device` copies; `tree` if no GPU is in use.

    The thread that makes batches calls it, which spares the training thread the work. All tensors must be on the CPU.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return tree
    tensors = _tensors(tree)
    return _rebuilt(tree, _views(_fill(tensors), tensors))


def pinned_bytes(count: int) -> Tensor:
    """An uninitialised pinned block, uint8 [count]."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def _fill(tensors: Sequence[Tensor]) -> Tensor:
    block = pinned_bytes(_layout(tensors)[1])
    for view, tensor in zip(_views(block, tensors), tensors, strict=True):
        view.copy_(tensor)
    return block


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """First byte of each tensor in the block, and the size of the block in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def _views(block: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of the block with the shapes and types of `tensors`, row-major."""
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
    """The block in which `pinned` laid these tensors out; None: they are not in such a block."""
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
    """The tensors of a tree, in the order of a dataclass's attributes and of items."""
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
    """`tree` with its tensors replaced by `tensors`, in the order of `_tensors`."""
    return cast(TreeT, _replaced(tree, iter(tensors)))


def _replaced(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(tree):
        new = object.__new__(type(tree))  # not replace(): fields may not be arguments, and need no new check
        vars(new).update({name: _replaced(value, tensors) for name, value in vars(tree).items()})
        return new
    if isinstance(tree, tuple | list) and not all(isinstance(item, ATOMS) for item in tree):
        items = [_replaced(item, tensors) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
