"""What happens when something goes wrong in the middle of a run, on whole trainings of a toy model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "toy_train.py"
HANG_TIMEOUT_S = 6


def start(run: Path, *arguments: object, ranks: int = 1) -> list[subprocess.Popen[str]]:
    """The ranks as processes of their own, without a launcher that would end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), "--run", str(run), *map(str, arguments)],
                env=os.environ | {name: str(value) for name, value in env.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    return out + err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", r"error: rank 1 on \S+ has not moved for \d+s: at step 3, in data; stacks of the ranks:"),
        pytest.param(
            "freeze", r"error: no sign of life of rank 1 on \S+; the others wait", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_step(tmp_path, fault, words) -> None:
    options = ["--fault", fault, "--fault-step", 3, "--hang-timeout", HANG_TIMEOUT_S]
    first, second = start(tmp_path / "run", *options, ranks=2)
    begin_s = time.monotonic()
    try:
        printed = output(first)
        assert first.returncode == 76
        assert time.monotonic() - begin_s < 60, "start, four steps, the time-out and the time to say so"
    finally:
        second.send_signal(signal.SIGCONT)
        second.kill()
        second.wait()
    assert re.search(words, printed), printed
    assert "Run the same command again" in printed
    stacks = (tmp_path / "run" / "hang" / "rank_00000.txt").read_text()
    assert "in all_reduce" in stacks, "where the waiting rank stood"


def test_full_memory_names_the_part_and_what_to_lower(tmp_path) -> None:
    (alone,) = start(tmp_path / "run", "--fault", "exhaust", "--fault-step", 2, "--fault-rank", 0)
    printed = output(alone)
    assert alone.returncode == 2
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 2, in data: out of memory, ") and "packing.tokens_per_pack" in line


def test_a_loss_spike_is_not_taken_and_its_batch_kept(tmp_path) -> None:
    spiked, plain = tmp_path / "spiked", tmp_path / "plain"
    options = ["--steps", 26, "--checkpoint-every", 22, "--on-loss-spike", "skip"]
    (process,) = start(spiked, "--spike-step", 24, *options)
    printed = output(process)
    assert process.returncode == 0, printed
    assert "step 24: loss" in printed and "step not taken" in printed
    (kept,) = (spiked / "spikes").iterdir()
    assert kept.name == "step_00000024_rank_00000.pt"
    # The same run without that step's data being huge differs in that step alone: up to it, all is equal.
    (process,) = start(plain, *options)
    assert process.wait(120) == 0
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (spiked, plain)
    ]
    assert [row["loss"] for row in rows[0][:24]] == [row["loss"] for row in rows[1][:24]]
    weights = torch.load(spiked / "export" / "model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert rows[0][25]["loss"] < 2 * rows[1][25]["loss"], "the weights did not move with the spike"


def test_a_loss_spike_can_roll_the_run_back(tmp_path) -> None:
    options = ["--steps", 27, "--spike-step", 24, "--checkpoint-every", 11, "--on-loss-spike", "roll_back"]
    (process,) = start(tmp_path / "run", *options)
    printed = output(process)
    assert process.returncode == 0, printed
    assert "rolled back from step 25 to step 11: loss" in printed
