"""Sources -> shards: a ledger for each, several at a time, and a progress line."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from data.shards import ShardWriter
from data.sources.base import BadItemError, Source

REPORT_EVERY_S = 1.0


@dataclass(frozen=True)
class Ledger:
    """Where the items of a source went: num_read = num_written + num_rejected."""

    num_read: int
    num_written: int
    num_rejected: int

    def __str__(self) -> str:
        return f"read {self.num_read} = written {self.num_written} + rejected {self.num_rejected}"


def write_source(
    source: Source,
    directory: Path,
    max_samples_per_shard: int,
    *,
    reject_bad: bool = False,
    report: Callable[[int], None] = lambda num_done: None,
) -> Ledger:
    """Writes a whole source as shards, continuing after what a killed run finished.

    A bad item raises BadItemError, or with `reject_bad` goes to rejected.jsonl with its reason. `report` is
    called with the number of items accounted for, after every item.
    """
    with ShardWriter(
        directory, max_samples_per_shard=max_samples_per_shard, source=source.description
    ) as writer:
        report(writer.num_consumed)
        for index in range(writer.num_consumed, len(source)):
            try:
                writer.write(source.sample(index))
            except BadItemError as error:
                if not reject_bad:
                    raise
                writer.reject(error.key, str(error))
            report(writer.num_consumed)
    ledger = Ledger(len(source), writer.num_written, writer.num_rejected)
    assert ledger.num_read == ledger.num_written + ledger.num_rejected
    return ledger


def write_sources(
    sources: Mapping[Path, Source], max_samples_per_shard: int, num_processes: int
) -> dict[Path, Ledger]:
    """Writes each source into its own folder; the processes share them out, so the bytes do not depend on
    their number. Prints a progress line. Bad items raise BadItemError."""
    # Forked workers need not import everything again (4 s); they run no thread pool of the parent's.
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", len(sources))
    progress = Progress(sum(len(source) for source in sources.values()))
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_start_worker, initargs=(counts,)
    ) as pool:
        futures = [
            pool.submit(_write_counted, slot, source, folder, max_samples_per_shard)
            for slot, (folder, source) in enumerate(sources.items())
        ]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, REPORT_EVERY_S, FIRST_EXCEPTION)
            progress.show(sum(counts.get_obj()))
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        return {folder: future.result() for folder, future in zip(sources, futures, strict=True)}


class Progress:
    """A line on stderr at most once a second: items, items a second, time left."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items
        self._start_s = self._shown_s = time.monotonic()
        self._first: int | None = None  # items that an earlier run had done

    def show(self, num_done: int) -> None:
        """Notes that `num_done` items are accounted for."""
        now_s = time.monotonic()
        if self._first is None:
            if num_done == 0:
                return  # the workers are still starting
            self._first, self._start_s = num_done, now_s
        if now_s - self._shown_s < REPORT_EVERY_S and num_done < self._num_items:
            return
        self._shown_s = now_s
        rate = (num_done - self._first) / max(now_s - self._start_s, 1e-3)
        left = f"{(self._num_items - num_done) / rate:.0f} s" if rate else "unknown"
        line = f"{num_done}/{self._num_items} items, {rate:.0f}/s, ETA {left}"
        print(line, file=sys.stderr, flush=True)


_counts: Any = None  # in a worker: items accounted for, by source


def _start_worker(counts: Any) -> None:
    """A worker ends with its parent even if that is killed: two writers must never share a folder."""
    global _counts
    _counts = counts
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def follow() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_counted(slot: int, source: Source, folder: Path, max_samples_per_shard: int) -> Ledger:
    def report(num_done: int) -> None:
        _counts[slot] = num_done

    return write_source(source, folder, max_samples_per_shard, report=report)
