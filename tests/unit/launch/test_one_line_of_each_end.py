"""A rank that cannot go on before the ranks have met never ends without a line of its own."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from base.config import StoppedError, UserError
from engine import distributed, job_endings, peers
from engine.job_endings import LOST_CONTACT
from launch.runs import entry


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`as_rank(rank, world, port)`: this process is that rank; short waits."""
    monkeypatch.setattr(peers, "ABSENCE_S", 0.5)
    monkeypatch.setattr(peers, "MEETING_S", 0.5)
    monkeypatch.setattr(job_endings, "LINGER_S", 0.2)
    monkeypatch.setattr(job_endings, "PARTING_S", 0.2)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(peers, "_has_met", False)

    def become(rank: int, world: int, port: int, num_local: int) -> None:
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank % num_local,
            "WORLD_SIZE": world,
            "LOCAL_SIZE": num_local,
            "LOCAL_WORLD_SIZE": num_local,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    yield become


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("num_local", [1, 3])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_meets_nobody_says_so_in_one_line(
    as_rank: Callable[..., None], capsys: pytest.CaptureFixture[str], rank: int, num_local: int
) -> None:
    """The first rank waits in vain for the others; another one does not reach the first one."""
    as_rank(rank, 3, distributed.free_port(), num_local)
    assert entry.run(lambda: peers.meet(0.5)) == LOST_CONTACT
    (line,) = lines(capsys)
    expected = "did not come to" if rank == 0 else f"rank {rank}: rank {rank} on "
    assert line.startswith("error: ") and expected in line


def test_a_first_rank_whose_port_is_taken_says_so_in_one_line(
    as_rank: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        as_rank(0, 2, other.getsockname()[1], 2)
        assert entry.run(lambda: peers.meet(0.5)) == LOST_CONTACT
    (line,) = lines(capsys)
    assert "cannot listen on 127.0.0.1" in line


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("no such label"), 2, "no such label"),
        (StoppedError("saved"), entry.STOPPED, "saved"),
        (IndexError("list index"), 1, "IndexError: list index"),
        (KeyboardInterrupt(), entry.INTERRUPTED, "stopped; the same command goes on from here"),
    ],
)
def test_a_rank_that_fails_before_the_others_come_says_why(
    as_rank: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    rank: int,
    error: BaseException,
    status: int,
    words: str,
) -> None:
    as_rank(rank, 2, distributed.free_port(), 2)

    def fail() -> None:
        raise error

    assert entry.run(fail) == status
    said = [line for line in lines(capsys) if words in line and not line.startswith(type(error).__name__)]
    assert len(said) == 1
    assert said[0].removeprefix("error: ").startswith("rank 1: " if rank else words)
