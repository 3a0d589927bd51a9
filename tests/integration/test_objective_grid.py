"""Every objective takes the steps of plain PyTorch: ZeRO stage x activation checkpointing x text output x DDT head."""

import json
from pathlib import Path
from typing import Any

import pytest

NUM_CASES = {"t2i": 4, "edit": 12, "class": 5, "pivot": 5, "joint": 5, "bridge": 1, "decoder": 1}
NUM_LINES = 3 * sum(NUM_CASES.values()) - 7
"""One for each stage; seven cases, with an adversary or an adaptive pivot weight, have no ZeRO-3."""
MOVED = 1e-3
"""Weights move by at least so much in the three steps."""
OFF = 2e-6
"""fp32: the largest weight is about 1 and a step sums a few hundred terms in another order; found: 1.2e-7."""
CHANGE_OFF = 1e-4
"""fp32, of each parameter's change: small gradients are differences of larger ones."""
FURTHER_METRICS = {
    "edit": ["text_loss"],
    "class": ["alignment"],
    "pivot": [
        "adversary_accuracy_fake",
        "adversary_loss",
        "gan",
        "lambda_gan",
        "lambda_pivot",
        "pivot",
        "rec",
    ],
    "joint": [
        "adversary_accuracy_fake",
        "adversary_loss",
        "gan",
        "lambda_gan",
        "lambda_pivot",
        "pivot",
        "kl",
    ],
    "bridge": ["feature", "kl", "rec"],
    "decoder": ["adversary_accuracy_fake", "adversary_loss", "gan", "lambda_gan", "rec"],
    "t2i": [],
}
"""Some of what the log shows beside the loss."""
ONE_OF_EACH = (
    "t2i text=none checkpointing=False head=False",
    "edit text=own checkpointing=True head=True",
    "class checkpointing=False head=False align=True",
    "with an adversary",
    "bridge",
)
WEIGHTED_AND_ADVERSARIAL = ("edit text=own checkpointing=True head=True", "decoder")


def lines_of(
    start_ranks: Any, output: Path, optimizer: str, *cases: str, ranks: int = 1
) -> list[dict[str, Any]]:
    processes = start_ranks("objective_grid.py", [optimizer, *cases], ranks, output)
    for process in processes:
        process.join(600)
    text = output.read_text()
    assert [process.exitcode for process in processes] == [0] * ranks, text
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')]


def check(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert line["moved"] > MOVED, line
        assert line["off"] < OFF and line["metric_off"] < OFF and line["norm_off"] < OFF, line


def check_sgd(lines: list[dict[str, Any]]) -> None:
    """A step of SGD is as long as the gradient: nothing hides a factor."""
    check(lines)
    for line in lines:
        assert line["change_off"] < CHANGE_OFF, line
        assert True in line["clipped"] and False in line["clipped"], line


def test_text_on_the_tied_output_trains_under_every_stage(start_ranks: Any, tmp_path: Path) -> None:
    """Under ZeRO-3 the embedding was partitioned away when the checkpointed cross entropy was computed again."""
    lines = lines_of(start_ranks, tmp_path / "log", "adamw", "edit text=tied checkpointing=True head=False")
    check(lines)
    assert [line["stage"] for line in lines] == [1, 2, 3]


def test_every_objective_takes_the_sgd_steps_of_plain_pytorch(start_ranks: Any, tmp_path: Path) -> None:
    """Three packs on two ranks: one of them repeats its pack at weight 0."""
    lines = lines_of(start_ranks, tmp_path / "log", "sgd", *ONE_OF_EACH, ranks=2)
    check_sgd(lines)
    metrics = {line["name"].split()[0]: line["metrics"] for line in lines}
    assert metrics.keys() == NUM_CASES.keys()
    for kind, names in FURTHER_METRICS.items():
        assert set(names) <= set(metrics[kind]), kind


@pytest.mark.parametrize("ranks", [1, 3])
def test_sgd_steps_do_not_depend_on_the_number_of_ranks(start_ranks: Any, tmp_path: Path, ranks: int) -> None:
    """Three packs one after another, or each on a rank of its own, of which one has no text to predict."""
    lines = lines_of(start_ranks, tmp_path / "log", "sgd", *WEIGHTED_AND_ADVERSARIAL, ranks=ranks)
    check_sgd(lines)
    assert [line["stage"] for line in lines] == [1, 2, 3, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_case_takes_the_sgd_steps_of_plain_pytorch(
    start_ranks: Any, tmp_path: Path, ranks: int
) -> None:
    lines = lines_of(start_ranks, tmp_path / "log", "sgd", ranks=ranks)
    check_sgd(lines)
    assert len(lines) == NUM_LINES


@pytest.mark.slow
def test_every_objective_takes_the_steps_of_plain_pytorch(start_ranks: Any, tmp_path: Path) -> None:
    lines = lines_of(start_ranks, tmp_path / "log", "adamw")
    check(lines)
    names = {line["name"] for line in lines}
    assert {kind: sum(name.startswith(kind) for name in names) for kind in NUM_CASES} == NUM_CASES
    assert len(lines) == NUM_LINES
