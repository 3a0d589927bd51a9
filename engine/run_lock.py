"""Allows one training at a time in a run folder. A second training is refused; a dead one does not block a restart.

The first rank holds a kernel lock (flock) on RUN/.lock, which the kernel releases when the process ends. A shared file
system may not be reliable: some grant the lock on each host separately, some grant none, and a server may keep the lock
of a host that lost power. So the file also names its owner, and the owner touches the file every BEAT_S seconds. A
training on another host counts as alive while the file's time changes, and as dead after SILENT_S without a change.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from base.config import UserError
from engine import distributed
from engine.distributed import Ranks

NAME = ".lock"
BEAT_S = 2.0
SILENT_S = 30.0
"""Longest wait of a restart, in seconds; it waits only if the kernel cannot tell that the training before has ended."""
BEATS_OF_A_LIVING = 2
"""Number of touches that prove a living owner: a single one may come from a process that was killed just then."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

State = Literal["ours", "held", "unknown"]
Tell = Callable[[str], None]

_descriptors: set[int] = set()


def _forget_in_child() -> None:
    """Closes the lock in a forked child, which would hold it after its parent's end. Executed programs have no copy."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@dataclass(frozen=True)
class Owner:
    """The process that trains in a folder."""

    host: str
    machine: str  # identifies the running kernel; changes with a reboot
    pid: int
    since_s: float  # unix time

    @classmethod
    def here(cls) -> Owner:
        """This process, training since now."""
        host = socket.gethostname()
        machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else host
        return cls(host, machine, os.getpid(), time.time())

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since_s))
        return f"{self.host}, process {self.pid}, since {since}"


@contextlib.contextmanager
def held(run_dir: Path, ranks: Ranks, tell: Tell) -> Iterator[None]:
    """Inside, this training holds the folder's lock. Collective; the first rank calls `tell` with lines for people.

    Raises UserError on every rank: another training holds the folder, or nothing can be written there.
    """
    lock, problem = None, ""
    try:
        if ranks.is_first:
            try:
                lock = RunLock.take(run_dir, tell)
            except UserError as error:
                problem = str(error)
        if problem := ranks.gather(problem)[0]:
            distributed.stop()  # all ranks raise it; only the first prints it (entry.run)
            raise UserError(problem)
        yield
    finally:
        if lock is not None:
            lock.release()


def refusal(run_dir: Path) -> str:
    """Why a training in `run_dir` cannot start now; '' if nobody holds the lock. Takes no lock and does not wait."""
    try:
        descriptor = os.open(run_dir / NAME, os.O_RDWR)
    except OSError:
        return ""
    try:
        is_held = _try(descriptor, fcntl.LOCK_SH)[0] == "held"
    finally:
        os.close(descriptor)
    return _refusal(run_dir, _look(run_dir / NAME)[0]) if is_held else ""


class RunLock:
    """A held lock of one run folder; a thread keeps touching its file until `release`."""

    def __init__(self, path: Path, descriptor: int, tell: Tell, beat_s: float) -> None:
        self._path, self._descriptor, self._tell, self._beat_s = path, descriptor, tell, beat_s
        self._owner = Owner.here()
        _descriptors.add(descriptor)
        self._write(json.dumps(asdict(self._owner)).encode())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls, run_dir: Path, tell: Tell, *, beat_s: float = BEAT_S, silent_s: float = SILENT_S
    ) -> RunLock:
        """Takes the lock; waits at most for an owner that may be dead.

        Raises UserError: another training holds it, or nothing can be written to `run_dir`.
        """
        path = run_dir / NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}; choose another run_dir") from None
        try:
            _wait(run_dir, descriptor, tell, beat_s, silent_s)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, tell, beat_s)

    def release(self) -> None:
        """Gives the lock up. The file stays: another training may hold a lock on it already."""
        self._stop.set()
        self._thread.join()
        if _look(self._path)[0] == self._owner:
            self._write(b"")
        _descriptors.discard(self._descriptor)
        os.close(self._descriptor)

    def _beat(self) -> None:
        is_ours = True
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a failing file system ends the training elsewhere
                os.utime(self._descriptor)
            other = _look(self._path)[0]
            if is_ours and other not in (None, self._owner):
                is_ours = False
                self._tell(f"WARNING: {self._path.parent}: {other} trains here, too; end one of them")

    def _write(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the kernel's lock is held nevertheless
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content, 0)
            os.fsync(self._descriptor)


def _wait(run_dir: Path, descriptor: int, tell: Tell, beat_s: float, silent_s: float) -> None:
    """Returns once no other training seems alive here. Raises UserError: another training is."""
    machine, path = Owner.here().machine, run_dir / NAME
    num_beats, last_beat, still_since_s = 0, None, time.monotonic()
    is_first_look = True
    while True:
        state, reason = _try(descriptor, fcntl.LOCK_EX)
        owner, beat = _look(path)
        is_here = owner is not None and owner.machine == machine
        if is_first_look and state == "unknown":
            tell(f"WARNING: {path}: no locks on this file system ({reason}); two starts at once go unnoticed")
        if (state == "ours" and is_here) or (state != "held" and owner is None):
            return  # this kernel saw the owner end, or the owner emptied the file
        if is_first_look and not is_here and owner is not None:
            tell(f"{run_dir}: last used by {owner}; looking for a sign of life, {silent_s:.0f} s at the most")
        now_s = time.monotonic()
        if beat != last_beat:
            num_beats += not is_first_look
            last_beat, still_since_s = beat, now_s
        if num_beats >= BEATS_OF_A_LIVING:
            raise UserError(_refusal(run_dir, owner))
        if now_s - still_since_s > silent_s:
            if state != "held":
                return
            if owner is not None and is_here and psutil.pid_exists(owner.pid):  # a stopped process
                raise UserError(_refusal(run_dir, owner))
            tell(f"WARNING: {run_dir}: still locked for {owner or 'nobody'}, with no sign of life; going on")
            return
        is_first_look = False
        time.sleep(min(beat_s / 4, silent_s / 4))


def _try(descriptor: int, kind: int) -> tuple[State, str]:
    """Tries to take the lock. Returns its state, and for `unknown` the reason."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held", ""
    except OSError as error:
        return "unknown", str(error.strerror)
    return "ours", ""


def _look(path: Path) -> tuple[Owner | None, int | None]:
    """The owner that the file names, if any, and its last change (ns). A new open makes NFS ask its server."""
    try:
        with path.open("rb") as file:
            return Owner(**json.loads(file.read())), os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    try:
        return None, path.stat().st_mtime_ns
    except OSError:
        return None, None


def _refusal(run_dir: Path, owner: Owner | None) -> str:
    return (
        f"{run_dir}: another training runs here: {owner or 'a process that has not said which'}; end it or "
        f"give another run_dir (if it is gone for certain: remove {run_dir / NAME})"
    )
