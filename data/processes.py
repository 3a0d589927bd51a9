"""Shares work among forked processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from base.config import UserError
from base.progress import REPORT_EVERY_S, ProgressLine

R = TypeVar("R")


def over_shards(
    work: Callable[[int], R], num_samples: Sequence[int], num_processes: int, what: str
) -> Iterator[R]:
    """Yields `work(shard)` for shards 0, 1, ... in order, with progress on stderr; `num_samples`: samples of each.

    With `num_processes` = 1 this process works; otherwise processes are forked. Raises UserError: less than one
    process, or a process was killed.
    """
    if num_processes < 1:
        raise UserError(f"{num_processes} processes; give at least 1")
    progress = ProgressLine(what, "samples")
    count, done = len(num_samples), 0
    results = map(work, range(count)) if num_processes == 1 else forked(work, count, num_processes)
    for shard, result in enumerate(results):
        yield result
        done += num_samples[shard]
        progress.show(done, done / max(sum(num_samples), 1))


def forked(
    work: Callable[[int], R], count: int, num_processes: int, tick: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """Yields `work(0)` to `work(count - 1)`, in order, from forked processes. Calls `tick` about once a second.

    Raises UserError: a process was killed. Raises what `work` raises, when its result is due.
    """
    # Forked workers need not import everything again (4 s), and inherit `work` without pickling.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start, initargs=(work,))
    try:
        for future in [pool.submit(_call, number) for number in range(count)]:
            while not future.done():
                wait([future], REPORT_EVERY_S)
                tick()
            yield future.result()
        tick()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for memory; run again with fewer --processes"
        ) from None
    except BaseException:
        for child in multiprocessing.active_children():  # the next run repeats half-done work
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_work: Any = None  # in a worker: the fork inherits it without pickling


def _start(work: Callable[[int], Any]) -> None:
    """Starts a worker, which ends even if its parent is killed: two writers must never share a folder."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(shard: int) -> Any:
    return _work(shard)
