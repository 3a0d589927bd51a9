"""Records a function of tensors as a CUDA graph, so that each of a solver's calls is one launch.

A call of a 24-layer model is about 2,000 launches, which take the CPU 18 ms at any batch size: with few images the GPU
waits for the CPU. A graph is recorded once; one launch then runs the recorded kernels on the recorded memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

TensorFunction = Callable[..., Tensor]
"""A function of tensors alone, whose shapes are equal in every call."""
EAGER_CALLS = 2
"""Calls before the recording. They load and choose kernels, and a graph of fewer uses would not pay."""


class Graphed:
    """`function` without gradients; recorded at the third call where `can_record` allows it.

    The function may read tensors beside its inputs: their values are read at every call, and they must keep their
    memory. Python numbers and branches are fixed at the recording. This object holds the recording's memory until it is
    deleted. A failed recording is reported once, and every call then runs without a graph.
    """

    _has_failed = False

    def __init__(self, function: TensorFunction, modules: Sequence[nn.Module]) -> None:
        """`modules`: the modules whose forward passes the function calls."""
        self._function, self._modules = function, modules
        self._num_calls = 0
        self._replay: TensorFunction | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result for `inputs`."""
        if self._replay is None and self._num_calls == EAGER_CALLS and not Graphed._has_failed:
            self._replay = self._recorded(inputs)
        self._num_calls += 1
        return (self._replay or self._function)(*inputs)

    def _recorded(self, inputs: Sequence[Tensor]) -> TensorFunction | None:
        if not can_record(inputs[0].device, self._modules):
            return None
        try:
            return record(self._function, inputs)
        except RuntimeError as error:  # the function waits for the CPU, or memory is short
            Graphed._has_failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"drawing goes on without CUDA graphs, more slowly: {reason}", stacklevel=3)
            return None


def can_record(device: torch.device, modules: Sequence[nn.Module]) -> bool:
    """Whether work on `device` through `modules` may become a graph.

    Modules with hooks may not (ZeRO-3 gathers weights in hooks): a graph would not run the hooks again.
    """
    if device.type != "cuda" or torch.is_grad_enabled():
        return False
    parts = [part for module in modules for part in module.modules()]
    return not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def record(function: TensorFunction, inputs: Sequence[Tensor]) -> TensorFunction:
    """`function` as a CUDA graph over copies of `inputs`, which are on one GPU.

    Raises RuntimeError: the function does something that a graph cannot hold.
    """
    with torch.cuda.device(inputs[0].device):
        stream = _recording_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # left even if the recording fails
            kept = [x.clone() for x in inputs]
            function(*kept)  # makes what cuBLAS needs once for a stream, outside the graph's memory
            # thread_local: the thread that reads ahead may pin memory meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = function(*kept)
        torch.cuda.current_stream().wait_stream(stream)

    def replay(*inputs: Tensor) -> Tensor:
        with torch.cuda.device(out.device):
            for mine, x in zip(kept, inputs, strict=True):
                mine.copy_(x)
            graph.replay()
            return out.clone()  # the next replay overwrites `out`

    return replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps a workspace of 32 MB for every stream it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
