"""Every objective takes the steps of plain PyTorch: ZeRO stage x activation checkpointing x text output x DDT head."""

import json
from pathlib import Path
from typing import Any

import pytest

NUM_CASES = {"t2i": 4, "edit": 12, "class": 4, "pivot": 4, "joint": 4}
MOVED = 1e-3
"""Weights move by at least so much in the two steps."""
OFF = 2e-6
"""fp32: the largest weight is about 1 and a step sums a few hundred terms in another order; found: 1.2e-7."""


def lines_of(start_ranks: Any, output: Path, *cases: str) -> list[tuple[str, int, float, float, float]]:
    (process,) = start_ranks("objective_grid.py", list(cases), 1, output)
    process.join(600)
    text = output.read_text()
    assert process.exitcode == 0, text
    return [tuple(json.loads(line)) for line in text.splitlines() if line.startswith('["')]


def check(lines: list[tuple[str, int, float, float, float]]) -> None:
    for name, stage, moved, off, loss_off in lines:
        assert moved > MOVED, name
        assert off < OFF and loss_off < OFF, (name, stage, off, loss_off)


def test_text_on_the_tied_output_trains_under_every_stage(start_ranks: Any, tmp_path: Path) -> None:
    """Under ZeRO-3 the embedding was partitioned away when the checkpointed cross entropy was computed again."""
    lines = lines_of(start_ranks, tmp_path / "log", "edit text=tied checkpointing=True head=False")
    check(lines)
    assert [stage for _, stage, *_ in lines] == [1, 2, 3]


@pytest.mark.slow
def test_every_objective_takes_the_steps_of_plain_pytorch(start_ranks: Any, tmp_path: Path) -> None:
    lines = lines_of(start_ranks, tmp_path / "log")
    check(lines)
    names = {name for name, *_ in lines}
    assert {kind: sum(name.startswith(kind) for name in names) for kind in NUM_CASES} == NUM_CASES
    assert len(lines) == 3 * len(names) - 4  # an adaptive pivot weight has no ZeRO-3
