"""How a job ends: the first rank that cannot go on tells the others why, and all end with its status.

A launcher returns the first status that it sees, and a scheduler acts on it: "try again" for a typing error would be
wrong twenty times. So before a rank goes it writes its status and its line into the store that the ranks met at; the
others look there, from a thread beside whatever they wait in. Each waits a moment until all have read it: launchers end
the ranks of a host as soon as one is gone, and the first rank's process holds the store.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from base.config import UserError
from base.terminal import say

LOST_CONTACT = 76
"""Status of a process that ends because another one is gone or hangs: a scheduler may give the same command again."""
POLL_S = 0.5
GRACE_S = 5.0
"""For the main thread to end by itself, writing down why, when another rank has ended."""
LINGER_S = 10.0
"""How long ranks wait at the most until the others have read: one that is stopped never does."""

PARTING_S = 2.0


@dataclass(frozen=True)
class End:
    """What a rank tells before it goes."""

    rank: int
    status: int
    text: str  # one line for people

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class EndedError(UserError):
    """Another rank has ended the job, and has told people why."""

    def __init__(self, end: End) -> None:
        super().__init__(str(end))
        self.end = end


class Board:
    """The place in the store where the end stands. Every method but `close` may be called from any thread."""

    def __init__(self, store: dist.Store, key: str, rank: int, world: int) -> None:
        """`key`: the job's own, so that nobody else's end is taken for this job's. A thread looks there from now on."""
        self._store, self._key, self._rank, self._world = store, key, rank, world
        self._lock = threading.Lock()
        self._end: End | None = None
        self._is_leaving = False
        self.witness: Callable[[End], None] = lambda end: None
        self._stop = threading.Event()
        # The main thread's client is locked while it waits for an answer.
        self._thread = threading.Thread(
            target=self._listen, args=(store.clone(),), name="endings", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside torch when the interpreter ends aborts it

    def settle(self, own: End) -> End:
        """The first end that was told: `own`, if nobody was faster, or the store is gone with the first rank."""
        with contextlib.suppress(RuntimeError):
            self._learn(self._store, lambda: self._store.compare_set(self._key, "", json.dumps(asdict(own))))
        return self._end or own

    def told(self) -> End | None:
        """What another rank told, if one did."""
        with contextlib.suppress(RuntimeError):
            self._look(self._store)
        return None if self._end is None or self._end.rank == self._rank else self._end

    def linger(self) -> None:
        """Waits until every rank has read the end, LINGER_S at the most; the first rank, until they have parted."""
        part(self._store, self._key, self._rank, self._world)

    def leave(self) -> None:
        """From here on it is no news that the first rank, and the store with it, is gone."""
        self._is_leaving = True

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _look(self, store: dist.Store) -> None:
        if store.check([self._key]):
            self._learn(store, lambda: store.get(self._key))

    def _learn(self, store: dist.Store, ask: Callable[[], bytes]) -> None:
        """Keeps the end and says so: from now on the store, and the first rank, may be gone."""
        with self._lock:
            if self._end is None:
                self._end = End(**json.loads(ask()))
                store.add(f"{self._key}/read", 1)

    def _listen(self, store: dist.Store) -> None:
        """Looks for the end, so that no rank waits for those that are gone."""
        while self._end is None:
            if self._stop.wait(POLL_S):
                return
            try:
                self._look(store)
            except RuntimeError:
                if not self._is_leaving and not self._stop.wait(GRACE_S):
                    who = End(
                        0, LOST_CONTACT, "lost contact with it, and with the ranks' store; look for its error"
                    )
                    say(f"error: {who}", sys.stderr)
                    self._cut_off(who)
                return
        if self._end.rank != self._rank and not self._stop.wait(GRACE_S):
            self._cut_off(self._end)

    def _cut_off(self, end: End) -> None:
        """Ends this process, whose main thread does not come back."""
        with contextlib.suppress(Exception):
            self.witness(end)
        os._exit(end.status)


def part(store: dist.Store, key: str, rank: int, num_readers: int, within_s: float = LINGER_S) -> None:
    """Waits until so many ranks have read what stands there, `within_s` at the most; the first rank, until they go.

    Every rank waits: a launcher that sees one of its ranks gone ends its others, and the first rank holds the store.
    """
    _wait_for(store, f"{key}/read", num_readers, within_s)
    with contextlib.suppress(RuntimeError):
        store.add(f"{key}/parted", 1)
    if rank == 0:  # torch prints its stack where a store is gone
        _wait_for(store, f"{key}/parted", num_readers, PARTING_S)


def _wait_for(store: dist.Store, counter: str, number: int, within_s: float) -> None:
    """Until so many ranks have added themselves."""
    deadline_s = time.monotonic() + within_s
    with contextlib.suppress(RuntimeError):  # the first rank is gone: it has waited for all
        while store.add(counter, 0) < number and time.monotonic() < deadline_s:
            time.sleep(0.05)


_board: Board | None = None


def open_board(store: Any, key: str, rank: int, world: int) -> None:
    """The ranks have met at this store."""
    global _board
    _board = Board(store, key, rank, world)


def is_open() -> bool:
    """Whether the ranks are together."""
    return _board is not None


def end(own: End, tell: Callable[[], None]) -> int:
    """The status with which this process has to end now, as all others do, while the board is open.

    `own`: how it would end; `tell` says that to people, and is called where no other rank was faster.
    """
    assert _board is not None
    first = _board.settle(own)
    if first == own:
        tell()
    if first.status != LOST_CONTACT:  # nobody waits for who is lost
        _board.linger()
    return first.status


def cause(error: BaseException) -> BaseException:
    """What ended this rank: the end that another one has told, else `error` itself."""
    end = None if _board is None else _board.told()
    return error if end is None else EndedError(end)


def witness(write_down: Callable[[BaseException], None]) -> None:
    """`write_down` is called with the end where the main thread hangs; from another thread."""
    if _board is not None:
        _board.witness = lambda end: write_down(EndedError(end))


def leave() -> None:
    """The ranks are about to part: from here on it is no news that the first one is gone."""
    if _board is not None:
        _board.leave()


def close() -> None:
    """The ranks have parted."""
    global _board
    if _board is not None:
        _board.close()
    _board = None
