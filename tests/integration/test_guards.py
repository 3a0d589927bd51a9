"""What happens when something goes wrong in the middle of a run, on whole trainings of a toy model."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import pytest
import torch

from engine.watchdog import GRACE_S, late_s

HANG_TIMEOUT_S = 6
STOPPED_HANG_S = 2.0
PROMISED_S = late_s(STOPPED_HANG_S) + GRACE_S
BUSY_S = 5.0  # for a machine that does other things, too


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", r"error: rank 1 on \S+ has not moved for \d+s: at step 3, in data; stacks of the ranks:"),
        pytest.param(
            "freeze", r"error: no sign of life of rank 1 on \S+; the others wait", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_step(toy, tmp_path, fault, words) -> None:
    options = ["--fault", fault, "--fault-step", 3, "--hang-timeout", HANG_TIMEOUT_S]
    result = toy(tmp_path / "run", *options, ranks=2)
    assert result.returncode == 76
    printed = result.output
    assert re.search(words, printed), printed
    assert "Run the same command again" in printed
    stacks = (tmp_path / "run" / "hang" / "rank_00000.txt").read_text()
    assert "in all_reduce" in stacks, "where the waiting rank stood"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_first_rank_that_is_stopped_is_named_by_every_other_one(start_ranks, tmp_path, world) -> None:
    """It holds the store through which ranks hear of each other."""
    run, output = tmp_path / "run", tmp_path / "output"
    fault = ["--fault", "freeze", "--fault-rank", 0, "--fault-step", 3, "--hang-timeout", STOPPED_HANG_S]
    arguments = ["--run", run, "--streams", world, *fault]
    first, *others = start_ranks("toy_train.py", arguments, world, output)
    try:
        start_s = time.monotonic()
        while first.is_alive() and state_of(first.pid) != "T" and time.monotonic() < start_s + 60:
            time.sleep(0.05)
        stopped_s = time.monotonic()
        for process in others:
            process.join(PROMISED_S + BUSY_S)
        assert [process.exitcode for process in others] == [76] * len(others), output.read_text()
        assert time.monotonic() - stopped_s < PROMISED_S + BUSY_S
    finally:
        for process in (first, *others):
            process.kill()
            process.join()
    line = (
        rf"error: no sign of life of rank 0 on {socket.gethostname()}; the others wait; stacks of the ranks:"
    )
    assert len(re.findall(line, output.read_text())) == len(others), output.read_text()
    assert "in all_reduce" in (run / "hang" / f"rank_{world - 1:05d}.txt").read_text()


def state_of(pid: int) -> str:
    """The letter of /proc: T, stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_an_evaluation_is_no_hang_however_long_it_takes(toy, tmp_path) -> None:
    options = ["--evaluate-every", 100, "--evaluation-seconds", 7, "--hang-timeout", 4]
    result = toy(tmp_path / "run", *options, ranks=2)
    assert result.returncode == 0, result.output
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert row["step"] == 8


def test_full_memory_names_the_part_and_what_to_lower(toy, tmp_path) -> None:
    result = toy(tmp_path / "run", "--fault", "exhaust", "--fault-step", 2, "--fault-rank", 0)
    assert result.returncode == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 2, in data: out of memory, ") and "packing.tokens_per_pack" in line


def test_a_loss_spike_is_not_taken_and_its_batch_kept(toy, tmp_path) -> None:
    spiked, plain = tmp_path / "spiked", tmp_path / "plain"
    options = ["--steps", 26, "--checkpoint-every", 22, "--on-loss-spike", "skip"]
    result = toy(spiked, "--spike-step", 24, *options)
    assert result.returncode == 0, result.output
    assert "step 24: loss" in result.output and "step not taken" in result.output
    (kept,) = (spiked / "spikes").iterdir()
    assert kept.name == "step_00000024_rank_00000.pt"
    # The same run without that step's data being huge differs in that step alone: up to it, all is equal.
    assert toy(plain, *options).returncode == 0
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (spiked, plain)
    ]
    assert [row["loss"] for row in rows[0][:24]] == [row["loss"] for row in rows[1][:24]]
    weights = torch.load(spiked / "export" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert rows[0][25]["loss"] < 2 * rows[1][25]["loss"], "the weights did not move with the spike"


def test_a_loss_spike_can_roll_the_run_back(toy, tmp_path) -> None:
    options = ["--steps", 27, "--spike-step", 24, "--checkpoint-every", 11, "--on-loss-spike", "roll_back"]
    result = toy(tmp_path / "run", *options)
    assert result.returncode == 0, result.output
    assert "rolled back from step 25 to step 11: loss" in result.output
