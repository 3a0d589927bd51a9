"""Of two trainings in one run folder the second is refused, and one that has died never holds up its successor."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from base.config import UserError
from engine import distributed, run_lock
from engine.job_endings import LostContactError
from engine.run_lock import Owner, RunLock
from launch.runs import training

QUICK_BEAT_S = 0.02
NEVER_S = 60.0  # of silence: no test is to wait for it
SOON_S = 0.2


def live(run_dir: Path, ready: Any, prepare: Callable[[], object] | None) -> None:
    """A training that holds the lock until it is ended."""
    RunLock.take(run_dir, print, beat_s=QUICK_BEAT_S)
    ready.send(prepare() if prepare else None)
    signal.pause()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """start(what it does then): a process with the lock of tmp_path; the process, and what that returned."""
    processes = []

    def begin(prepare: Callable[[], object] | None = None) -> tuple[Any, Any]:
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe()
        process = context.Process(target=live, args=(tmp_path, sender, prepare))
        process.start()
        processes.append(process)
        return process, receiver.recv()

    yield begin
    for process in processes:
        process.kill()
        process.join()


def take(run_dir: Path, told: list[str] | None = None, silent_s: float = NEVER_S) -> RunLock:
    tell = (lambda _text: None) if told is None else told.append
    return RunLock.take(run_dir, tell, beat_s=QUICK_BEAT_S, silent_s=silent_s)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(_seconds: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr(run_lock.time, "sleep", sleep)


def write_owner(run_dir: Path, **changed: object) -> Owner:
    """The record of a training that has not said that it ended."""
    owner = replace(Owner.here(), **changed)
    (run_dir / run_lock.NAME).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_second_training_is_refused_and_told_who_has_the_folder(start, tmp_path) -> None:
    process, _ = start()
    told: list[str] = []
    with pytest.raises(UserError) as error:
        take(tmp_path, told)
    line = str(error.value)
    assert (
        f"{tmp_path}: another training runs here: {Owner.here().host}, process {process.pid}, since 20"
        in line
    )
    assert "\n" not in line and told == [] and process.is_alive()
    with pytest.raises(UserError):
        take(tmp_path)


def test_after_kill_9_the_next_one_starts_at_once(start, tmp_path, no_waiting) -> None:
    process, _ = start()
    process.kill()
    process.join()
    assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == process.pid
    take(tmp_path).release()


def leave_children() -> list[int]:
    """A forked process and one that is started with all descriptors; both outlive this one."""
    child = os.fork()
    if not child:
        signal.pause()
    script = "import signal; print(flush=True); signal.pause()"
    other = subprocess.Popen([sys.executable, "-c", script], close_fds=False, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    return [child, other.pid]


def test_children_that_outlive_a_killed_training_do_not_keep_the_lock(start, tmp_path, no_waiting) -> None:
    process, children = start(leave_children)
    process.kill()
    process.join()
    try:
        take(tmp_path).release()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def inherit(run_dir: Path) -> subprocess.Popen[bytes]:
    """A process that holds the lock without knowing it, as one would that a C library forks."""
    descriptor = os.open(run_dir / run_lock.NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    process = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor])
    os.close(descriptor)
    return process


def test_a_process_that_dies_late_is_waited_for(tmp_path, monkeypatch) -> None:
    process = inherit(tmp_path)
    write_owner(tmp_path, pid=process.pid)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        process.kill()
        process.wait()

    monkeypatch.setattr(run_lock.time, "sleep", sleep)
    take(tmp_path).release()
    assert len(waits) == 1


def test_a_lock_that_an_orphan_keeps_for_good_holds_nobody_up(tmp_path) -> None:
    orphan = inherit(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = write_owner(tmp_path, pid=gone.pid)
    told: list[str] = []
    take(tmp_path, told, SOON_S).release()
    assert told == [f"WARNING: {tmp_path}: still locked for {owner}, with no sign of life; going on"]
    orphan.kill()
    orphan.wait()


def test_a_training_that_was_stopped_still_has_its_folder(start, tmp_path) -> None:
    process, _ = start()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {process.pid}, since"):
        take(tmp_path, silent_s=SOON_S)


@pytest.mark.parametrize("is_locked", [False, True], ids=["lock lost", "lock kept by the server"])
def test_a_lost_host_holds_up_its_successor_on_another_for_a_while_only(tmp_path, is_locked) -> None:
    server = inherit(tmp_path) if is_locked else None
    owner = write_owner(tmp_path, host="node-a", machine="another", pid=1)
    told: list[str] = []
    take(tmp_path, told, SOON_S).release()
    assert told[0].startswith(f"{tmp_path}: last used by {owner}; looking for a sign of life")
    assert [line.startswith("WARNING") for line in told[1:]] == [True] * is_locked
    if server is not None:
        server.kill()
        server.wait()


def test_a_training_on_another_host_is_noticed_where_locks_are_of_each_host_alone(
    tmp_path, monkeypatch
) -> None:
    write_owner(tmp_path, host="node-a", machine="another", pid=1)
    beats = iter(range(1, 100))
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(tmp_path / ".lock", (0, next(beats))))
    with pytest.raises(UserError, match=r"another training runs here: node-a, process 1, since"):
        take(tmp_path)
    assert next(beats) == 3, "two signs of life are enough"


def test_one_sign_of_life_may_be_the_last(tmp_path, monkeypatch) -> None:
    write_owner(tmp_path, host="node-a", machine="another", pid=1)
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(tmp_path / ".lock", (0, 1)))
    take(tmp_path, silent_s=SOON_S).release()


def test_a_run_that_has_ended_goes_on_anywhere_at_once(tmp_path, no_waiting, monkeypatch) -> None:
    take(tmp_path).release()
    monkeypatch.setattr(run_lock, "BOOT_ID", tmp_path / "none")  # another machine
    told: list[str] = []
    take(tmp_path, told).release()
    assert told == []


def without_locks(_descriptor: int, _kind: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_a_training_goes_on_with_a_warning(tmp_path, monkeypatch, no_waiting) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    told: list[str] = []
    take(tmp_path, told).release()
    assert len(told) == 1 and "WARNING" in told[0] and "No locks available" in told[0]


def test_without_locks_a_living_training_is_noticed_and_a_dead_one_is_not_in_the_way(
    start, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    process, _ = start()
    with pytest.raises(UserError, match=f"process {process.pid}, since"):
        take(tmp_path)
    process.kill()
    process.join()
    take(tmp_path, silent_s=SOON_S).release()


def test_a_training_that_was_taken_for_dead_says_so_and_leaves_the_record_to_its_successor(tmp_path) -> None:
    told: list[str] = []
    revived = take(tmp_path, told)
    successor = write_owner(tmp_path, host="node-b", machine="another")
    deadline_s = time.monotonic() + NEVER_S
    while not told and time.monotonic() < deadline_s:
        time.sleep(QUICK_BEAT_S)
    assert told == [f"WARNING: {tmp_path}: {successor} trains here, too; end one of them"]
    revived.release()
    assert json.loads((tmp_path / run_lock.NAME).read_text())["host"] == "node-b"


class Told:
    """Ranks of which the first has said `answer`."""

    is_first = False

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def gather(self, value: str) -> list[str]:
        return [self.answer, value]


def test_every_rank_ends_with_what_the_first_one_found(tmp_path) -> None:
    with pytest.raises(UserError, match="it is taken"), run_lock.held(tmp_path, Told("it is taken"), print):
        raise AssertionError("it trains")
    with run_lock.held(tmp_path, Told(""), print):
        assert not list(tmp_path.iterdir()), "only the first rank takes it"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/\.lock: cannot be written: .*; choose another run_dir"):
        take(tmp_path / "file")


def test_a_port_that_the_other_training_has_is_told_as_that_training(start, tmp_path, monkeypatch) -> None:
    def busy() -> None:
        raise LostContactError("cannot listen on 127.0.0.1:29500")

    monkeypatch.setattr(distributed, "start", busy)
    monkeypatch.setattr(training, "OTHER_START_S", 0.0)
    with pytest.raises(LostContactError):
        training._start_ranks(tmp_path)
    process, _ = start()
    with pytest.raises(UserError, match=f"another training runs here: .*, process {process.pid}, since"):
        training._start_ranks(tmp_path)


def test_a_training_that_started_a_moment_ago_is_told_as_well(tmp_path, monkeypatch) -> None:
    """It has the port, and will have the folder: the second one waits for its name."""
    mine: list[RunLock] = []

    def busy() -> None:
        raise LostContactError("cannot listen on 127.0.0.1:29500")

    def sleep(_seconds: float) -> None:
        mine.append(take(tmp_path))

    monkeypatch.setattr(distributed, "start", busy)
    monkeypatch.setattr(training.time, "sleep", sleep)
    with pytest.raises(UserError, match=rf"another training runs here: .*, process {os.getpid()}, since 20"):
        training._start_ranks(tmp_path)
    mine[0].release()
