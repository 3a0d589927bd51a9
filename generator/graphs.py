"""A function of tensors that a solver calls again and again, on a GPU as one launch (a CUDA graph).

A call of a 24-layer model is about 2,000 launches, 18 ms of the CPU at any batch size: few images wait for them. A
graph is recorded once and launches the same kernels on the same memory by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

TensorFunction = Callable[..., Tensor]
"""Of tensors alone, whose shapes are the same in every call."""
EAGER_CALLS = 2
"""Calls before the recording: they load and choose kernels, and a graph of fewer uses would not pay."""


class Graphed:
    """`function` without gradients; recorded at the third call where `can_record` allows it.

    A recording keeps what the function reads beside its inputs: those tensors are read anew at every call and must stay
    where they are, numbers and choices of Python are not looked at again. Its memory is free again with this object.
    Where a recording fails, it is told once and every call runs as before.
    """

    _has_failed = False

    def __init__(self, function: TensorFunction, modules: Sequence[nn.Module]) -> None:
        """`modules`: whose forward passes the function calls."""
        self._function, self._modules = function, modules
        self._num_calls = 0
        self._replay: TensorFunction | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives."""
        if self._replay is None and self._num_calls == EAGER_CALLS and not Graphed._has_failed:
            self._replay = self._recorded(inputs)
        self._num_calls += 1
        return (self._replay or self._function)(*inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> TensorFunction | None:
        if not can_record(inputs[0].device, self._modules):
            return None
        try:
            return record(self._function, inputs)
        except RuntimeError as error:  # a kernel that waits for the CPU, too little memory
            Graphed._has_failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"drawing goes on without CUDA graphs, more slowly: {reason}", stacklevel=3)
            return None


def can_record(device: torch.device, modules: Sequence[nn.Module]) -> bool:
    """Whether work on `device` through `modules` may become a graph.

    Not where modules have hooks (ZeRO-3 gathers weights in them): a graph would not run these again.
    """
    if device.type != "cuda" or torch.is_grad_enabled():
        return False
    parts = [part for module in modules for part in module.modules()]
    return not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def record(function: TensorFunction, inputs: Sequence[Tensor]) -> TensorFunction:
    """`function` as a CUDA graph over copies of `inputs`, which are on one GPU.

    Raises RuntimeError: it does something that a graph cannot hold.
    """
    with torch.cuda.device(inputs[0].device):
        stream = _recording_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # also left where the recording fails
            kept = [x.clone() for x in inputs]
            function(*kept)  # makes what cuBLAS needs once for a stream, outside of the graph's memory
            # thread_local: the thread that reads ahead may pin memory meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = function(*kept)
        torch.cuda.current_stream().wait_stream(stream)

    def replay(*inputs: Tensor) -> Tensor:
        with torch.cuda.device(out.device):
            for mine, x in zip(kept, inputs, strict=True):
                mine.copy_(x)
            graph.replay()
            return out.clone()  # the next replay writes there

    return replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace of 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
