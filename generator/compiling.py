"""torch.compile on functions of modules: what is compiled serves every layer, and a copy of a model its own weights.

A compiled function takes the module as an argument. Nothing compiled is kept in a module, so copies, state dicts and
exports are those of the plain model; parameters are inputs of the graph, so layers of one shape share it.
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
"""torch.compile's: a name ("inductor" makes kernels, "aot_eager" only traces), or a function."""
FEWEST_ROWS = 2
"""The compiler takes sizes 0 and 1 for constants: it would compile anew for them."""


def backend_for(backend: Compiler | None, *tensors: Tensor) -> Compiler | None:
    """`backend`, with the number of rows of `tensors` declared to vary; None if one has too few rows for that."""
    if backend is None or min(map(len, tensors)) < FEWEST_ROWS:
        return None
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return backend


def whole(function: FunctionT, backend: Compiler | None) -> FunctionT:
    """`function` compiled without a graph break, or as it is if `backend` is None or operations are being counted."""
    return function if backend is None or _is_watched() else _compiled(function, backend)


def _is_watched() -> bool:
    """Whether a mode sees every operation (pre-flight counts bytes so on a CPU): the compiler refuses to run there."""
    mode = _get_current_dispatch_mode()
    return mode is not None and not mode.is_infra_mode()


@cache
def _compiled(function: FunctionT, backend: Compiler) -> FunctionT:
    return cast(FunctionT, torch.compile(function, backend=backend, fullgraph=True))
