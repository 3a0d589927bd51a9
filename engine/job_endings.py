"""How a job ends: the first rank that cannot go on tells the others why, and all end with its status.

A launcher returns the first status that it sees, and a scheduler acts on that status: it should not try a typing error
again twenty times. So a rank that ends first writes its status and its message into the store that the ranks met at.
The other ranks poll the store from a thread, whatever their main thread waits in. Each rank waits a moment until all
have read the message: launchers end the ranks of a host as soon as one is gone, and the first rank holds the store.
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
from typing import TYPE_CHECKING, Any

from base.config import UserError
from base.terminal import say

if TYPE_CHECKING:  # so that every command knows the errors, and none needs torch to print one
    import torch.distributed as dist

LOST_CONTACT = 76
"""Exit status of a process that ends because another rank is gone or hangs: a scheduler may repeat the command."""
POLL_S = 0.5
GRACE_S = 5.0
"""How long the main thread has to end by itself, writing down why, after another rank has ended."""
LINGER_S = 10.0
"""How long ranks wait at most until the others have read the message: a stopped process never reads it."""

PARTING_S = 2.0


@dataclass(frozen=True)
class End:
    """What a rank tells the others before it ends."""

    rank: int
    status: int
    text: str  # one line for people

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class LostContactError(UserError):
    """Another rank is gone, so this rank cannot go on."""


class EndedError(UserError):
    """Another rank has ended the job, and has told people why."""

    def __init__(self, end: End) -> None:
        super().__init__(str(end))
        self.end = end


class Board:
    """The entry of the store that holds the job's end. Every method but `close` may be called from any thread."""

    def __init__(self, store: dist.Store, key: str, rank: int, world: int) -> None:
        """`key`: the job's own, so that another job's end is not taken for its end. Starts the thread that polls it."""
        self._store, self._key, self._rank, self._world = store, key, rank, world
        self._lock = threading.Lock()
        self._end: End | None = None
        self._is_leaving = False
        self.witness: Callable[[End], None] = lambda end: None
        self._stop = threading.Event()
        # The thread needs a client of its own: a client is locked while it waits for an answer.
        self._thread = threading.Thread(
            target=self._listen, args=(store.clone(),), name="endings", daemon=True
        )
        self._thread.start()
        atexit.register(self.close)  # the interpreter aborts if it ends while a thread is inside torch

    def settle(self, own: End) -> End:
        """The first end that a rank told: `own`, if no rank was faster, or if the store is gone with the first rank."""
        with contextlib.suppress(RuntimeError):
            self._learn(self._store, lambda: self._store.compare_set(self._key, "", json.dumps(asdict(own))))
        return self._end or own

    def told(self) -> End | None:
        """The end that another rank told; None: no other rank told one first."""
        with contextlib.suppress(RuntimeError):
            self._look(self._store)
        return None if self._end is None or self._end.rank == self._rank else self._end

    def linger(self) -> None:
        """Waits until every rank has read the end, LINGER_S at most; the first rank also until they have parted."""
        part(self._store, self._key, self._rank, self._world)

    def leave(self) -> None:
        """From now on a vanished store counts as a normal end of the first rank, not as lost contact."""
        self._is_leaving = True

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _look(self, store: dist.Store) -> None:
        if store.check([self._key]):
            self._learn(store, lambda: store.get(self._key))

    def _learn(self, store: dist.Store, ask: Callable[[], bytes]) -> None:
        """Keeps the end and counts this rank as a reader: from now on the store, and the first rank, may be gone."""
        with self._lock:
            if self._end is None:
                self._end = End(**json.loads(ask()))
                store.add(f"{self._key}/read", 1)

    def _listen(self, store: dist.Store) -> None:
        """The thread's loop: polls for the end, so that no rank waits for ranks that are gone."""
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
        """Ends this process, whose main thread does not return from what it waits in."""
        with contextlib.suppress(Exception):
            self.witness(end)
        os._exit(end.status)


def part(store: dist.Store, key: str, rank: int, num_readers: int, within_s: float = LINGER_S) -> None:
    """Waits until `num_readers` ranks have read the entry `key`, `within_s` at most; the first rank also until they go.

    Every rank waits: a launcher that sees one of its ranks gone ends the others, and the first rank holds the store.
    """
    _wait_for(store, f"{key}/read", num_readers, within_s)
    with contextlib.suppress(RuntimeError):
        store.add(f"{key}/parted", 1)
    if rank == 0:  # torch prints a stack trace in clients whose store is gone
        _wait_for(store, f"{key}/parted", num_readers, PARTING_S)


def _wait_for(store: dist.Store, counter: str, number: int, within_s: float) -> None:
    """Waits until `number` ranks have added themselves to `counter`, `within_s` at most."""
    deadline_s = time.monotonic() + within_s
    with contextlib.suppress(RuntimeError):  # the first rank is gone: it has waited for all
        while store.add(counter, 0) < number and time.monotonic() < deadline_s:
            time.sleep(0.05)


_board: Board | None = None


def open_board(store: Any, key: str, rank: int, world: int) -> None:
    """Opens this process's board, once the ranks have met at `store`."""
    global _board
    _board = Board(store, key, rank, world)


def is_open() -> bool:
    """Whether the ranks have met and not parted yet."""
    return _board is not None


def end(own: End, tell: Callable[[], None]) -> int:
    """The status with which this process must end now, as all others do. The board must be open.

    `own`: how this process would end; `tell` prints that, and is called if no other rank was faster.
    """
    assert _board is not None
    first = _board.settle(own)
    if first == own:
        tell()
    if first.status != LOST_CONTACT:  # a lost rank never reads it
        _board.linger()
    return first.status


def cause(error: BaseException) -> BaseException:
    """What ended this rank: the end that another rank has told, else `error` itself."""
    end = None if _board is None else _board.told()
    return error if end is None else EndedError(end)


def witness(write_down: Callable[[BaseException], None]) -> None:
    """Registers `write_down`, which another thread calls with the end if the main thread hangs."""
    if _board is not None:
        _board.witness = lambda end: write_down(EndedError(end))


def leave() -> None:
    """The ranks are about to part: from now on a vanished first rank is no error."""
    if _board is not None:
        _board.leave()


def close() -> None:
    """Closes the board, once the ranks have parted."""
    global _board
    if _board is not None:
        _board.close()
    _board = None
