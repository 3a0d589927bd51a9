"""Finds the rank that hangs, with a thread in every process that reports the rank's position.

A process group's own timeout ends the ranks that wait, and names no rank. Here every rank writes its position (step,
part of the step) to a store. When a rank has not moved for too long, the ranks furthest behind are named, every rank
writes its stacks to RUN/hang/, and all ranks end. A launcher or a scheduler can then repeat the command.

The first rank's process holds the store. Calls to the store have no time limit, so a separate thread makes them and may
block for ever. If no answer comes, the first rank is the silent one. Every rank then prints that, because no rank can
read another's report.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from base.terminal import say
from engine.distributed import Ranks
from engine.job_endings import LOST_CONTACT
from engine.logs import seconds_text
from engine.network_access import open_store
from engine.spans import Place

BEATS_PER_TIMEOUT = 8
GRACE_S = 5.0  # time for the rank that prints: a launcher ends all ranks when one is gone
STORE_TIMEOUT_S = 20.0

AnswerT = TypeVar("AnswerT")


def late_s(timeout_s: float) -> float:
    """Longest time from a rank's last move until it is named, in seconds. GRACE_S later all ranks have ended."""
    return timeout_s * (1 + 1 / BEATS_PER_TIMEOUT) + 2 * _patience_s(timeout_s)


def _patience_s(timeout_s: float) -> float:
    """How long the store may take to answer."""
    return min(STORE_TIMEOUT_S, timeout_s / 4)


@dataclass(frozen=True)
class Beat:
    """A rank's report of its position."""

    rank: int
    host: str
    step: int
    part: str  # the open part of the step; empty: between two parts
    num_entered: int  # parts entered in this step; all ranks go through equal parts
    still_s: float  # seconds since the last change of position
    told_s: float  # unix time


class Watchdog:
    """The thread that watches one rank. It calls `where` for the step and the place in the step."""

    def __init__(
        self, ranks: Ranks, timeout_s: float, where: Callable[[], tuple[int, Place]], run_dir: Path
    ) -> None:
        """Joins the ranks' store and starts the thread. Collective."""
        self._ranks, self._timeout_s, self._where = ranks, timeout_s, where
        self._folder = run_dir / "hang"
        self._host = socket.gethostname()
        self._store, self._first_host = self._join_store()
        self._stop = threading.Event()
        self._is_off = False
        self._question: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, no rank counts as hanging: one rank may work for hours while the others wait."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False

    def _join_store(self) -> tuple[dist.TCPStore, str]:
        """The first rank's store, and its host."""

        def join(port: int) -> dist.TCPStore:
            return open_store(port, serves=self._ranks.is_first, timeout_s=STORE_TIMEOUT_S)

        store = join(0) if self._ranks.is_first else None
        port, host = self._ranks.gather((store.port if store else 0, self._host))[0]
        return store or join(port), host

    def _run(self) -> None:
        seen, since_s = self._where(), time.monotonic()
        while True:
            now = self._where()
            if now != seen or self._is_off:
                seen, since_s = now, time.monotonic()
            still_s = time.monotonic() - since_s
            is_heard = self._ask(partial(self._tell, *seen, still_s))
            if still_s > self._timeout_s:
                self._end(self._ask(self._beats) if is_heard else None)
            if self._stop.wait(self._timeout_s / BEATS_PER_TIMEOUT):
                return

    def _ask(self, call: Callable[[], AnswerT]) -> AnswerT | None:
        """The store's answer; None: no answer, because the first rank's process is stopped or gone."""
        answers: list[AnswerT] = []

        def ask() -> None:
            with contextlib.suppress(dist.DistError, RuntimeError):
                answers.append(call())

        if self._question is None or not self._question.is_alive():
            self._question = threading.Thread(target=ask, name="watchdog's question", daemon=True)
            self._question.start()
        self._question.join(_patience_s(self._timeout_s))
        return answers[0] if answers else None

    def _tell(self, step: int, place: Place, still_s: float) -> bool:
        """Writes this rank's report and waits until the store has it. Returns whether it does."""
        beat = Beat(self._ranks.rank, self._host, step, place.part, place.num_entered, still_s, time.time())
        self._store.set(str(self._ranks.rank), json.dumps(asdict(beat)))
        return self._store.check([str(self._ranks.rank)])  # `set` alone waits for no answer

    def _beats(self) -> Sequence[Beat | None]:
        """Every rank's last report, in rank order; None: no report yet. Asks once, as all ranks ask at one time."""
        names = [str(rank) for rank in range(self._ranks.world)]
        there = names if self._store.check(names) else [name for name in names if self._store.check([name])]
        told = dict(zip(there, self._store.multi_get(there), strict=True))
        return [Beat(**json.loads(told[name])) if name in told else None for name in names]

    def _end(self, beats: Sequence[Beat | None] | None) -> None:
        """Names the hanging ranks and ends this process, even if its main thread blocks or the disk does not answer."""
        ending = threading.Timer(GRACE_S, os._exit, (LOST_CONTACT,))
        ending.start()
        if beats is None:
            message, speaks = silence([f"rank 0 on {self._first_host}"]), True
        else:
            message, hanging = verdict(beats, self._timeout_s)
            speaks = self._ranks.rank == next((r for r in range(self._ranks.world) if r not in hanging), 0)
        if speaks:
            say(
                f"error: {message}; stacks of the ranks: {self._folder}. "
                "Run the same command again: it goes on at the last checkpoint",
                sys.stderr,
            )
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank_{self._ranks.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        ending.join()


def silence(names: Sequence[str]) -> str:
    """The message about ranks that report nothing any more."""
    return f"no sign of life of {', '.join(names)}; the others wait"


def verdict(beats: Sequence[Beat | None], timeout_s: float) -> tuple[str, set[int]]:
    """The ranks that hang, in words and as a set of rank numbers (empty: all ranks stand still together).

    A rank that reports nothing any more is stopped, or its host is gone. If all ranks report, those furthest behind are
    to blame: the others can only be waiting for them.
    """
    now_s = max(beat.told_s for beat in beats if beat is not None)
    limit_s = 3 * timeout_s / BEATS_PER_TIMEOUT
    silent = {rank for rank, beat in enumerate(beats) if beat is None or now_s - beat.told_s > limit_s}
    if silent:
        return silence([_name(rank, beats[rank]) for rank in sorted(silent)]), silent
    heard = [beat for beat in beats if beat is not None]
    behind = min((beat.step, beat.num_entered) for beat in heard)
    guilty = [beat for beat in heard if (beat.step, beat.num_entered) == behind]
    first = guilty[0]
    what = f"at step {first.step}, {'in ' + first.part if first.part else 'between two parts of it'}"
    still = seconds_text(min(beat.still_s for beat in guilty))
    if len(guilty) == len(heard) > 1:
        return f"no rank has moved for {still}: all are {what}", set()
    names = ", ".join(_name(beat.rank, beat) for beat in guilty)
    return f"{names} has not moved for {still}: {what}", {beat.rank for beat in guilty}


def _name(rank: int, beat: Beat | None) -> str:
    return f"rank {rank}" if beat is None else f"rank {rank} on {beat.host}"
