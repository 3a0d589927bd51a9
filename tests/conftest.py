"""Shared by all tests: one torch thread (with more, tiny models wait for each other on busy machines), and a GPU that
is not there, which counts how often the CPU would wait for it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and what the tests start

aten = torch.ops.aten
OF_DATA = {  # their result, or its size, is known to the CPU only when the GPU has computed it
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_consecutive, aten.unique_dim,
}  # fmt: skip


class Waits(list[str]):
    """Names of the points at which the CPU would wait for the GPU, in order."""

    num_copies = 0
    """From the CPU to the GPU, waited for or not."""

    @staticmethod
    def to_gpu(module: nn.Module) -> None:
        """Moves a module of real tensors to cuda:0, as fake ones: Module.to() cannot turn one into the other."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    fake = torch.empty_like(parameter, device="cuda:0")
                    part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cuda:0")


class AnywhereGenerator(torch.Generator):
    """One that says it is on a GPU, which could not be made without one; fake tensors draw nothing from it."""

    def __new__(cls, device: Any = "cpu") -> "AnywhereGenerator":
        self = super().__new__(cls)
        self.place = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.place


class _Dispatched(TorchDispatchMode):
    """Operations that would make the CPU wait, by name, in `waits`; `pinned`: blocks that may be copied freely."""

    def __init__(self, waits: Waits, pinned: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self.waits, self.pinned = waits, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
        if packet is aten._to_copy:
            device = torch.device(kwargs.get("device") or args[0].device)
            self._copied(args[0], device.type, kwargs.get("non_blocking", False), func)
        elif packet is aten.copy_:
            self._copied(args[1], args[0].device.type, (*args, False)[2], func)
        elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and on_gpu:
            given = [x for x in args[1] if x is not None]
            if any(not x.is_cuda or x.dtype in (torch.bool, torch.uint8) for x in given):
                self.waits.append(f"{func}: a mask, or an index on the CPU")
        elif packet is aten.repeat_interleave and kwargs.get("output_size") is None and on_gpu:
            self.waits.append(f"{func} without output_size")
        elif packet in OF_DATA and on_gpu:
            self.waits.append(str(func))
            if packet is aten._local_scalar_dense:
                return 1  # any number: fake tensors have none
        return func(*args, **kwargs)

    def _copied(self, source: Tensor, to: str, non_blocking: bool, func: Any) -> None:
        if source.device.type == to:
            return
        self.waits.num_copies += to == "cuda"
        is_pinned = any(source.untyped_storage()._cdata == block._cdata for block in self.pinned)
        if not (non_blocking and is_pinned and to == "cuda"):
            self.waits.append(f"{func}: {source.device.type} to {to}, {list(source.shape)}")


class _Called(TorchFunctionMode):
    """What dispatch does not see: tensors on the GPU from numbers of Python, and numbers of Python from those."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            if torch.device(kwargs.get("device") or torch.get_default_device()).type == "cuda":
                self.waits.append(f"{func.__name__} of numbers on the GPU")
        elif func in (Tensor.tolist, Tensor.numpy) and args[0].is_cuda:
            self.waits.append(func.__name__)
        return func(*args, **kwargs)


@pytest.fixture
def device_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], contextlib.AbstractContextManager[Waits]]:
    """`with device_waits() as waits`: tensors inside are fake, cuda:0 is there, and `waits` names every point at which
    the CPU would wait for it so far: a copy that is not from a block of data.packs.transfer, a number read, a mask as
    index.

    Make models and batches before, move them inside: a batch by its `to`, a model by `waits.to_gpu`.
    """
    waits = Waits()
    pinned: list[torch.UntypedStorage] = []

    def pinned_bytes(count: int) -> Tensor:
        block = torch.empty(count, dtype=torch.uint8)
        pinned.append(block.untyped_storage())
        return block

    @contextlib.contextmanager
    def counting() -> Iterator[Waits]:
        with monkeypatch.context() as patched:
            patched.setattr("data.packs.transfer.pinned_bytes", pinned_bytes)
            patched.setattr(torch, "Generator", AnywhereGenerator)
            for name in ("synchronize", "Stream.synchronize", "Event.synchronize"):
                patched.setattr(f"torch.cuda.{name}", lambda *_: waits.append("synchronize"))
            with FakeTensorMode(allow_non_fake_inputs=True), _Dispatched(waits, pinned), _Called(waits):
                yield waits

    return counting
