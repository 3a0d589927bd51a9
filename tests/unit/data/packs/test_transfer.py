"""Batches on their way to a GPU: one block, one copy, and every tensor as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.packs import transfer
from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.packs.transfer import ALIGNMENT, pinned, to_device
from data.plan.prefetch import Prefetch
from data.samples.images import PixelBatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


class Pair(NamedTuple):
    first: Tensor
    second: object


@dataclasses.dataclass(frozen=True)
class Tree:
    left: Any
    right: Any
    name: str = "x"
    counted: int = dataclasses.field(init=False, default=3)

    def __post_init__(self) -> None:
        if self.name == "moved":
            raise AssertionError("checked again")

    @cached_property
    def total(self) -> Tensor:
        return torch.zeros(1)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    values = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)  # any bits that are all valid
    x = values[..., 0].to(torch.bool) if dtype == torch.bool else values.view(dtype)[..., 0].clone()
    layout = draw(st.sampled_from(["plain", "transposed", "every other"]))
    if layout == "transposed" and x.ndim > 1:
        x = x.transpose(0, -1)
    return x[::2] if layout == "every other" and x.ndim else x


TREES = st.recursive(
    st.one_of(tensors(), st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.builds(Tree, inner, inner),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3),
        st.builds(Pair, tensors(), inner),
    ),
    max_leaves=12,
)


def leaves(tree: object) -> Iterator[object]:
    """Every value with the types on the way to it; written apart from the code under test."""
    if isinstance(tree, Tree):
        yield Tree
        for part in (tree.left, tree.right, tree.name, tree.counted):
            yield from leaves(part)
    elif isinstance(tree, tuple | list):
        yield type(tree)
        yield len(tree)
        for part in tree:
            yield from leaves(part)
    else:
        yield tree


def assert_same(found: object, expected: object) -> None:
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    for one, other in pairs:
        if isinstance(other, Tensor):
            assert isinstance(one, Tensor) and one.dtype == other.dtype and one.shape == other.shape
            rows = [torch.empty(x.numel(), dtype=x.dtype).copy_(x.flatten()) for x in (one, other)]
            assert torch.equal(*(row.view(torch.uint8) for row in rows))
        else:
            assert one == other


@pytest.fixture
def gpu_in_use(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """As if CUDA had been started; the blocks that would be pinned."""
    blocks: list[Tensor] = []

    def allocate(count: int) -> Tensor:
        blocks.append(torch.full((count,), 255, dtype=torch.uint8))
        return blocks[-1]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(transfer, "pinned_bytes", allocate)
    return blocks


@given(tree=TREES)
@settings(max_examples=100, deadline=None)
def test_a_block_holds_every_tensor_as_it_was(tree: object) -> None:
    blocks: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(
            transfer, "pinned_bytes", lambda count: blocks.append(torch.zeros(count).byte()) or blocks[-1]
        )
        laid_out = pinned(tree)
    assert_same(laid_out, tree)
    (block,) = blocks
    of_block = block.untyped_storage().data_ptr()
    for x in leaves(laid_out):
        if isinstance(x, Tensor) and x.numel():
            assert x.untyped_storage().data_ptr() == of_block
            assert (x.data_ptr() - of_block) % ALIGNMENT == 0 and x.is_contiguous()


@given(tree=TREES)
@settings(max_examples=50, deadline=None)
def test_on_the_cpu_nothing_is_copied(tree: object) -> None:
    assert to_device(tree, CPU) is tree
    assert pinned(tree) is tree  # no GPU is in use


def test_fields_are_taken_as_they_are_and_what_was_cached_goes_along(gpu_in_use: list[Tensor]) -> None:
    tree = Tree(torch.zeros(2), Tree(torch.ones(3), None))
    assert (
        torch.equal(tree.total, torch.zeros(1)) and "total" in vars(tree) and "total" not in vars(tree.right)
    )
    object.__setattr__(tree, "name", "moved")
    object.__setattr__(tree, "counted", 9)
    moved = pinned(tree)
    assert moved is not tree and (moved.name, moved.counted) == ("moved", 9)
    assert moved.total.untyped_storage().data_ptr() == gpu_in_use[0].data_ptr()
    assert torch.equal(moved.total, tree.total) and "total" not in vars(moved.right)


def test_what_is_there_already_is_not_made_again() -> None:
    batch = packed()
    assert to_device(batch, CPU) is batch and batch.to(CPU) is batch


def packed() -> PackedBatch:
    image = torch.randn(4, 2, 3)
    samples = [
        [TextSplit([1, 5, 2], loss=True), ImageSplit(image, noisy=True)],
        [ImageSplit(image, noisy=False)],
    ]
    return build_packed_batch(
        samples, vision_start_id=28, vision_end_id=29, max_side=4, seed=7, sample_ids=["a", "b"]
    )


BATCHES: dict[str, Callable[[], Any]] = {
    "packed": packed,
    "classes": lambda: ClassBatch(torch.randn(2, 4, 2, 3), torch.arange(2), ("a", "b"), 7),
    "pixels": lambda: PixelBatch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ("a", "b"), 7, ({}, {})),
}


class Copies(TorchDispatchMode):
    """Bytes and `non_blocking` of every copy from the CPU to a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
            if out.is_cuda and not source.is_cuda:
                self.met.append((source.nbytes, bool((kwargs or {}).get("non_blocking"))))
        return out


def all_tensors(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if dataclasses.is_dataclass(tree):
        tree = tuple(getattr(tree, field.name) for field in dataclasses.fields(tree))
    return [x for part in tree for x in all_tensors(part)] if isinstance(tree, tuple) else []


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_reaches_the_gpu_in_one_copy_that_nothing_waits_for(kind: str, device_waits: Any) -> None:
    batch = BATCHES[kind]()
    with device_waits() as waits, Copies() as copies:
        moved = batch.to(CUDA)
    pairs = list(zip(all_tensors(moved), all_tensors(batch), strict=True))
    assert waits == [] and [non_blocking for _, non_blocking in copies.met] == [True]
    assert all(x.device == CUDA and x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    assert moved.sample_ids == batch.sample_ids and moved.seed == batch.seed


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_that_was_read_ahead_is_not_laid_out_again(
    kind: str, gpu_in_use: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: self.untyped_storage()._cdata in known)
    ready = pinned(BATCHES[kind]())
    known = {block.untyped_storage()._cdata for block in gpu_in_use}
    shared = transfer._shared_block(all_tensors(ready))
    assert shared is not None and shared.data_ptr() == gpu_in_use[0].data_ptr()
    assert shared.nbytes == gpu_in_use[0].nbytes
    # Neither a part of a block, which would be copied whole, nor tensors of their own pass for one.
    assert transfer._shared_block(all_tensors(ready)[:1]) is None or len(all_tensors(ready)) == 1
    assert transfer._shared_block([x.clone() for x in all_tensors(ready)]) is None


def test_the_thread_that_reads_ahead_works_on_the_gpu_of_its_maker(
    gpu_in_use: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads start on the first GPU; pinning there would leave a context on it for every other rank."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def items() -> Iterator[list[int]]:
        yield list(chosen)

    ahead = Prefetch(items(), 1)
    assert ahead.next() == [3]
    ahead.close()
