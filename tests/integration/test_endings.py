"""Whatever ends one rank ends all, with one status and one line: a scheduler must not repeat a typing error."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.runs import entry

StartRanks = Callable[[str, list[str], int, Path], list[BaseProcess]]
STATUSES = {"mistake": 2, "bug": 1, "stop": entry.STOPPED, "usage": 2}
END_S = 60.0  # a limit of hangs: a case takes two seconds
POLL_S = 0.05


@pytest.fixture
def job(start_ranks: StartRanks, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """`job(arguments, ranks, launchers)`: every rank's status, and each launcher's, and what was printed.

    A launcher starts its share of the ranks, returns the first status it sees, and then ends its other ranks.
    """

    def run(*arguments: object, ranks: int, launchers: int = 1) -> SimpleNamespace:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.log"
        processes = start_ranks("ends.py", list(map(str, arguments)), ranks, output)
        share = ranks // launchers
        hosts = [processes[i * share : (i + 1) * share] for i in range(launchers)]
        seen: list[Any] = [None] * launchers
        deadline_s = time.monotonic() + END_S
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline_s:
            for number, host in enumerate(hosts):
                ended = [process.exitcode for process in host if process.exitcode]
                if ended and seen[number] is None:
                    seen[number] = random.choice(ended)
                    for process in host:
                        process.terminate()
            time.sleep(POLL_S)
        for number, host in enumerate(hosts):
            if seen[number] is None:
                seen[number] = next((process.exitcode for process in host if process.exitcode), 0)
        for process in processes:
            process.kill()
            process.join()
        text = output.read_text()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        return SimpleNamespace(launchers=seen, lines=lines, text=text)

    return run


CASES = [
    (ranks, launchers, fails, when, others)
    for ranks, launchers in ((2, 1), (2, 2), (4, 2))
    for fails in ((0,), (ranks - 1,), tuple(range(ranks)))
    for when in ((), ("--before-they-meet",))
    for others in (("collective",) if when or len(fails) == ranks else ("collective", "asleep", "apart"))
]


def check(job: Any, error: str, case: tuple[Any, ...]) -> None:
    ranks, launchers, fails, when, others = case
    result = job(
        "--error", error, "--ranks", *fails, *when, "--others", others, ranks=ranks, launchers=launchers
    )
    assert result.launchers == [STATUSES[error]] * launchers, result.text
    assert len(result.lines) == 1, result.text
    assert ("Traceback" in result.text) == (error == "bug"), result.text


@pytest.mark.parametrize("error", ["mistake", "bug", "stop"])
def test_all_ranks_end_with_the_status_and_the_line_of_the_first(job: Any, error: str) -> None:
    check(job, error, (2, 2, (1,), (), "collective"))


def test_the_first_rank_stays_until_the_others_know(job: Any) -> None:
    check(job, "mistake", (4, 2, (0,), (), "apart"))


def test_a_mistake_of_one_host_before_the_ranks_meet_is_told_to_the_others(job: Any) -> None:
    check(job, "mistake", (2, 2, (1,), ("--before-they-meet",), "collective"))


def test_a_command_line_that_one_host_refuses_is_told_to_the_others(job: Any) -> None:
    """They waited ten minutes for it, and then said that it had not come."""
    check(job, "usage", (2, 2, (1,), ("--before-they-meet",), "collective"))


def test_ranks_of_the_first_host_stay_until_a_late_host_has_heard(job: Any) -> None:
    """Its launcher ends the rank that holds the store as soon as another of its ranks is gone."""
    check(job, "stop", (4, 2, (0,), ("--before-they-meet", "--late", 2, 3), "collective"))


@pytest.mark.slow
def test_a_mistake_ends_the_job_with_its_status_thirty_times_out_of_thirty(job: Any) -> None:
    for number, case in enumerate(CASES):
        check(job, ("mistake", "bug", "stop")[number % 3], case)
    assert len(CASES) >= 30


def test_a_killed_rank_ends_the_job_with_try_again(job: Any) -> None:
    result = job("--error", "killed", "--ranks", 1, "--others", "collective", ranks=2, launchers=2)
    assert result.launchers == [entry.LOST_CONTACT, -signal.SIGKILL], result.text
    assert len(result.lines) == 1 and "lost contact" in result.lines[0], result.text
