"""Ctrl-C: a training saves and stops, a second one ends it at once; other commands say one line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.runs import entry
from report.watch import read_run

WAIT_S = 100


@pytest.mark.parametrize("hangs", [False, True])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(start_ranks: Any, tmp_path: Path, hangs: bool) -> None:
    """One that hangs in its data cannot save; the second one ends it all the same."""
    fault = ("--fault", "hang", "--fault-rank", 0, "--fault-step", 12) if hangs else ()
    arguments = ["--run", tmp_path, "--steps", 100_000, "--checkpoint-every", 10, *fault]
    (process,) = start_ranks("toy_train.py", arguments, 1, tmp_path / "log")
    deadline_s = time.monotonic() + WAIT_S
    while not (tmp_path / "checkpoints" / "step_00000010").is_dir():
        assert process.is_alive() and time.monotonic() < deadline_s, (tmp_path / "log").read_text()
        time.sleep(0.02)
    time.sleep(1 if hangs else 0)
    os.kill(process.pid, signal.SIGINT)
    if hangs:
        time.sleep(1)
        os.kill(process.pid, signal.SIGINT)
    process.join(WAIT_S)
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if "interrupted at step" in line and "Ctrl-C" in line]
    run = read_run(tmp_path)
    if hangs:
        assert process.exitcode == -signal.SIGINT
        assert "interrupted at step 12: " in line and line.endswith("the same command goes on at step 10")
    else:
        assert run.events[-1].kind == "stop" and run.events[-1].text.startswith("interrupted at step")
        assert f"step_{run.step:08d}" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_ctrl_c_of_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As sample.py, evaluate.py and encode_latents.py are started, alone."""

    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        statuses = [entry.run(interrupted), entry.run(interrupted, has_ranks=False)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert statuses == [130, 130]
    assert capsys.readouterr().err.splitlines() == ["stopped; the same command goes on from here"] * 2
