"""Runs an iterator ahead in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class Prefetch(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead. After an exception there, every `next` raises it.

    The thread uses its creator's GPU. CUDA starts every thread on the first GPU, on which a rank of another GPU would
    occupy half a gigabyte.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | _Failure] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._gpu = torch.cuda.current_device() if in_use else None
        self._failure: _Failure | None = None
        self._thread = threading.Thread(target=self._run, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> T:
        """Waits for the next item and returns it. Raises what the iterator raised."""
        if self._failure is None:
            item = self._ready.get()
            if not isinstance(item, _Failure):
                return item
            self._failure = item
        raise self._failure.error

    def close(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:  # frees a thread that waits for room in the queue, so that it sees the flag
                self._ready.get_nowait()
        self._thread.join()

    def _run(self, items: Iterator[T]) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            while not self._stopped.is_set():
                self._ready.put(next(items))
        except BaseException as error:
            self._ready.put(_Failure(error))
