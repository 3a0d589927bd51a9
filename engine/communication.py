"""How long a step waits for other ranks: DeepSpeed's collectives, timed where it calls its backend.

The backend object is private to DeepSpeed 0.19 (see engine/deepspeed_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.spans import Spans

COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
SPAN = "communication"


def time_collectives(spans: Spans) -> None:
    """From now on `spans` holds the time for which collectives hold up the step: their own, and that of slower ranks.

    Communication hidden behind computation is not counted: of an operation that is awaited later, only the wait counts.
    """
    from deepspeed.comm import comm

    backend = comm.cdb
    for name in COLLECTIVES:
        # The class's method is wrapped, not the instance's, which an earlier run in this process has replaced.
        setattr(backend, name, _timed(getattr(type(backend), name).__get__(backend), spans))


def _timed(operation: Callable[..., Any], spans: Spans) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with spans(SPAN):
            handle = operation(*arguments, **options)
        return handle if handle is None else _Handle(handle, spans)

    return call


class _Handle:
    """The handle of an asynchronous operation, whose wait is timed."""

    def __init__(self, handle: Any, spans: Spans) -> None:
        self._handle, self._spans = handle, spans

    def wait(self, *arguments: Any) -> Any:
        """Waits as the operation's own handle does, and returns its result."""
        with self._spans(SPAN):
            return self._handle.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
