"""An iterator that runs ahead in a thread."""

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
    """Runs an iterator in a thread, `depth` items ahead; hands its exception to the consumer, again and again.

    The thread works on the GPU of the one that makes it: every thread starts on the first, where a rank of another GPU
    would leave half a gigabyte.
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
        """The next item; waits for it."""
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
            while True:  # a thread that waits for room in the queue goes on and sees the flag
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
