"""torch.compile for functions of modules: all layers share the compiled code, and a model's copy uses its own weights.

A compiled function takes the module as an argument. Modules hold nothing compiled, so copies, state dicts and exports
equal the plain model's. Parameters are inputs of the graph, so layers of one shape share it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
Compiler = str | Callable[..., Any]
"""A backend of torch.compile: a name ("inductor" makes kernels, "aot_eager" only traces), or a function."""
FEWEST_ROWS = 2
"""Fewest rows to compile for. The compiler takes sizes 0 and 1 for constants and would compile again for each."""


def backend_for(backend: Compiler | None, *tensors: Tensor) -> Compiler | None:
    """`backend`, with the number of rows of `tensors` declared to vary; None if one has too few rows for that."""
    if backend is None or min(map(len, tensors)) < FEWEST_ROWS:
        return None
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return backend


def whole(function: FunctionT, backend: Compiler | None) -> FunctionT:
    """`function` compiled without a graph break; unchanged if `backend` is None or operations are being counted."""
    return function if backend is None or _is_watched() else _compiled(function, backend)


def _is_watched() -> bool:
    """Whether a mode watches every operation, as pre-flight's count of bytes; the compiler refuses to run in one."""
    mode = _get_current_dispatch_mode()
    return mode is not None and not mode.is_infra_mode()


@cache
def _compiled(function: FunctionT, backend: Compiler) -> FunctionT:
    return cast(FunctionT, torch.compile(function, backend=backend, fullgraph=True))
