"""Finds the rank that hangs: a thread in every process, beside the step, that says who is where.

A process group's own timeout ends the ranks that wait, and names nobody. Here every rank tells a store how far it is
(step, part of the step); when one has not moved for too long, the ranks that are behind and do not wait for others are
named, every rank writes its stacks to RUN/hang/, and all end: a launcher or a scheduler starts the same command again.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from engine.distributed import Ranks
from engine.endings import LOST_CONTACT
from engine.logs import seconds_text
from engine.spans import Place
from engine.terminal import say

BEATS_PER_TIMEOUT = 8
GRACE_S = 5.0  # for the rank that speaks: a launcher ends all ranks when the first one is gone
STORE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    step: int
    part: str  # of the step; empty: between two
    num_entered: int  # parts of the step so far: all ranks go through the same ones
    still_s: float  # for so long nothing has changed
    told_s: float  # unix time


class Watchdog:
    """`where` gives the step and the place in it; it is called from another thread."""

    def __init__(
        self, ranks: Ranks, timeout_s: float, where: Callable[[], tuple[int, Place]], run_dir: Path
    ) -> None:
        """Collective. The thread starts at once."""
        self._ranks, self._timeout_s, self._where = ranks, timeout_s, where
        self._folder = run_dir / "hang"
        self._host = socket.gethostname()
        self._store = self._join_store()
        self._stop = threading.Event()
        self._is_off = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nobody is blamed: one rank may work for hours while the others wait."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False

    def _join_store(self) -> dist.TCPStore:
        def join(port: int) -> dist.TCPStore:
            return dist.TCPStore(
                os.environ["MASTER_ADDR"],
                port,
                is_master=self._ranks.is_first,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=STORE_TIMEOUT_S),
            )

        store = join(0) if self._ranks.is_first else None  # 0: any free port
        port = self._ranks.gather(store.port if store else 0)[0]
        return store or join(port)

    def _run(self) -> None:
        seen, since_s = self._where(), time.monotonic()
        while True:
            now = self._where()
            if now != seen or self._is_off:
                seen, since_s = now, time.monotonic()
            still_s = time.monotonic() - since_s
            try:
                self._tell(*seen, still_s)
                if still_s > self._timeout_s:
                    self._end([self._beat(rank) for rank in range(self._ranks.world)])
            except (dist.DistError, RuntimeError):  # the first rank's process, which holds the store, is gone
                if still_s > self._timeout_s:
                    self._end(None)
            if self._stop.wait(self._timeout_s / BEATS_PER_TIMEOUT):
                return

    def _tell(self, step: int, place: Place, still_s: float) -> None:
        beat = Beat(self._ranks.rank, self._host, step, place.part, place.num_entered, still_s, time.time())
        self._store.set(str(self._ranks.rank), json.dumps(asdict(beat)))

    def _beat(self, rank: int) -> Beat | None:
        name = str(rank)
        return Beat(**json.loads(self._store.get(name))) if self._store.check([name]) else None

    def _end(self, beats: Sequence[Beat | None] | None) -> None:
        """Tells and ends this process, whatever its main thread is waiting for."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank_{self._ranks.rank:05d}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if beats is None:
            message, speaker = "the first rank's process does not answer", 1
        else:
            message, hanging = verdict(beats, self._timeout_s)
            speaker = next((r for r in range(self._ranks.world) if r not in hanging), 0)
        if self._ranks.rank == speaker:
            say(
                f"error: {message}; stacks of the ranks: {self._folder}. "
                "Run the same command again: it goes on at the last checkpoint",
                sys.stderr,
            )
        time.sleep(GRACE_S)
        os._exit(LOST_CONTACT)


def verdict(beats: Sequence[Beat | None], timeout_s: float) -> tuple[str, set[int]]:
    """Who hangs, in words and as rank numbers.

    A rank that tells nothing any more is stopped, or its host is gone; else those are to blame that are the furthest
    behind: the others can only be waiting for them.
    """
    now_s = max(beat.told_s for beat in beats if beat is not None)
    late_s = 3 * timeout_s / BEATS_PER_TIMEOUT
    silent = {rank for rank, beat in enumerate(beats) if beat is None or now_s - beat.told_s > late_s}
    if silent:
        names = ", ".join(_name(rank, beats[rank]) for rank in sorted(silent))
        return f"no sign of life of {names}; the others wait", silent
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
