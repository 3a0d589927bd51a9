"""A run writes down what happened to it, and how it ended (trainings of the toy model, see scripts/toy_train.py)."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from report.watch import read_run

SCRIPT = Path(__file__).parent / "scripts" / "toy_train.py"


def command(run: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), "--run", str(run), *map(str, arguments)]


def kinds(run: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]


def test_a_roll_back_a_kill_and_a_resume_are_all_told(toy: Any, tmp_path: Path) -> None:
    arguments = ("--poison-step", 4, "--on-alarm", "roll_back", "--max-nonfinite", 1)
    assert toy(tmp_path / "run", *arguments, "--kill-after", 6).returncode == -signal.SIGKILL
    assert toy(tmp_path / "run", *arguments).returncode == 0
    before = ["start", "checkpoint", "nonfinite", "roll_back"]
    assert kinds(tmp_path / "run") == [*before, "resume", "checkpoint", "checkpoint", "finish"]
    run = read_run(tmp_path / "run")
    assert run.step == run.num_steps == 8 and run.state(time.time()) == "finished"
    assert run.last("roll_back").text.startswith("rolled back from step 5 to step 3")
    assert {"system/cpu_cores", "system/resident_gib", "system/disk_free_gib"} <= run.training.last().keys()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--spike-step", 4, "--on-alarm", "stop"), "stopped at step 5 by an alarm"),
        (("--steps", 100_000, "--checkpoint-every", 100_000), "stopped by a signal"),
    ],
)
def test_a_stop_is_told_with_its_reason(tmp_path: Path, arguments: tuple[object, ...], text: str) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(run, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 20:
            process.terminate()
            break
        time.sleep(0.05)
    assert process.wait(timeout=100) == 2
    event = read_run(run).events[-1]
    assert event.kind == "stop" and event.text.startswith(text)
    assert read_run(run).state(time.time()) == "stopped"
