"""A disk that fills up under a training, a run folder that goes, an output that nobody takes: none ends it.

The kernel (RLIMIT_FSIZE) refuses every file that the process writes to: one that a later version adds, too.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

STEPS = ("--steps", 12, "--checkpoint-every", 4, "--sample-every", 2)
POISON = ("--poison-step", 5, "--export-at", 2)
SPARED = {"metrics.jsonl", "events.jsonl", "scores.jsonl", "samples"}


@pytest.fixture
def train(start_ranks: Any, tmp_path: Path) -> Any:
    """`train(run folder, *arguments, ranks=1)`: as `toy`, with the output in a pipe, which no limit of files ends."""

    def launch(run: Path, *arguments: object, ranks: int = 1) -> SimpleNamespace:
        pipe, chunks = tmp_path / f"{len(list(tmp_path.iterdir()))}.pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: chunks.append(pipe.read_text()))
        reader.start()
        processes = start_ranks("toy_train.py", ["--run", run, *STEPS, *arguments], ranks, pipe)
        for process in processes:
            process.join(120)
            process.kill()
        reader.join(10)
        return SimpleNamespace(statuses=[process.exitcode for process in processes], output="".join(chunks))

    return launch


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "export" / "model.pt", weights_only=True)


def assert_equal_exports(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def warned(output: str) -> list[str]:
    """The files that were told of, each as often as it was."""
    return [
        line.partition("WARNING: ")[2].split(" cannot")[0]
        for line in output.splitlines()
        if "cannot be written" in line
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_while_costs_what_it_could_not_take(train, tmp_path, ranks) -> None:
    """From step 3 to 9: log lines, samples, the batch of a step that was not taken, scores, a checkpoint."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*POISON, "--evaluate-every", 4]
    assert train(whole, *options, ranks=ranks).statuses == [0] * ranks
    result = train(run, *options, "--full", 3, 9, ranks=ranks)
    assert result.statuses == [0] * ranks and "Traceback" not in result.output, result.output
    assert sorted(warned(result.output)) == sorted(SPARED), "once a file"
    assert "step not taken; batch not kept: " in result.output
    assert "the checkpoint of step 4 could not be saved" in result.output
    assert_equal_exports(run, whole)
    assert [row["step"] for row in lines_of(run / "metrics.jsonl")] == [1, 2, 3, 10, 11, 12]
    assert [row["step"] for row in lines_of(run / "scores.jsonl")] == [12]
    assert not [path for path in run.rglob("*.tmp*") if "checkpoints" not in path.parts], (
        "no part of a file stays"
    )
    names = {path.relative_to(whole).parts[0] for path in whole.rglob("*") if path.is_file()}
    assert names - {path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file()} == {
        "nonfinite"
    }


LAST = "the checkpoint of step 12 could not be saved: "
EARLY = "/export_step_00000006 cannot be written: No space left on device; step 6 is saved: "
EXPORT = "/export cannot be written: No space left on device; step 12 is saved: "


@pytest.mark.parametrize(
    ("early", "fault", "words", "goes_on_at", "ranks"),
    [
        ([], ["--full", 9, 99], LAST, 8, 1),
        ([], ["--fail-export"], EXPORT, 12, 1),
        pytest.param(["--export-at", 6], ["--fail-export"], EARLY, 6, 1, marks=pytest.mark.slow),
        pytest.param(["--export-at", 6], ["--fail-export"], EARLY, 6, 2, marks=pytest.mark.slow),
    ],
)
def test_what_must_be_saved_and_cannot_ends_the_training_with_one_line(
    train, tmp_path, early, fault, words, goes_on_at, ranks
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *early, ranks=ranks).statuses == [0] * ranks
    result = train(run, *early, *fault, ranks=ranks)
    assert result.statuses == [2] * ranks and "Traceback" not in result.output, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert words in line and "make room and run the same command again" in line
    again = train(run, *early, ranks=ranks)
    assert again.statuses == [0] * ranks and f"resumed at step {goes_on_at}/12" in again.output, again.output
    assert_equal_exports(run, whole)
    early_exports = [folder / "export_step_00000006" / "model.pt" for folder in (run, whole) if early]
    assert len({path.read_bytes() for path in early_exports}) <= 1


def test_a_run_folder_that_somebody_deletes_costs_what_was_in_it(train, tmp_path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole).statuses == [0]
    result = train(run, "--fault", "delete", "--fault-step", 5, "--fault-rank", 0)
    assert result.statuses == [0] and "Traceback" not in result.output, result.output
    told = warned(result.output)
    assert len(told) == len(set(told)) and {"metrics.jsonl", "samples"} <= set(told) <= SPARED
    assert_equal_exports(run, whole)
    assert [row["step"] for row in lines_of(run / "metrics.jsonl")] == [9, 10, 11, 12], (
        "since a checkpoint made it anew"
    )
    assert train(run, "--steps", 12).statuses == [0]
