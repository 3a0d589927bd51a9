"""A run that goes on under a changed config says so, key by key, or refuses naming the key (the toy training)."""

import json
from pathlib import Path
from typing import Any

import pytest


def events(run: Path, *kinds: str) -> list[str]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows if row["kind"] in kinds]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_changed_key_is_told_with_both_values(toy: Any, tmp_path: Path, ranks: int) -> None:
    run = tmp_path / "run"
    assert toy(run, "--zero", 1, ranks=ranks).returncode == 0
    again = toy(run, "--zero", 2, "--checkpoint-every", 4, ranks=ranks)
    assert again.returncode == 0, again.output
    told = events(run, "change")
    assert told == [
        "changed since the last start: engine.zero_stage 1 -> 2",
        "changed since the last start: engine.checkpoint_every_steps 3 -> 4",
    ]
    assert all(again.output.count(line) == 1 for line in told)  # by one rank


def test_a_raised_number_of_steps_tells_the_jump_of_the_learning_rate(toy: Any, tmp_path: Path) -> None:
    """Cosine from 1e-2 to 0 over 8 steps, two of them warm-up; step 8 of 16 is 6/14 of the way."""
    run = tmp_path / "run"
    assert toy(run).returncode == 0
    assert toy(run, "--steps", 16).returncode == 0
    told = events(run, "change")
    assert told[0] == "changed since the last start: engine.steps 8 -> 16"
    assert told[1].startswith("the learning rate of the next step is 0.00611, and would have been 0")


def test_fewer_steps_than_the_checkpoint_has_are_told(toy: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert toy(run).returncode == 0
    assert toy(run, "--steps", 5).returncode == 0
    assert events(run, "warning") == [
        "engine.steps is 5, the newest checkpoint is of step 8: nothing is trained, and that checkpoint is exported"
    ]


def test_the_same_config_tells_nothing(toy: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert toy(run, "--steps", 5).returncode == toy(run, "--steps", 5).returncode == 0
    assert events(run, "change", "warning") == []


def test_another_optimizer_is_refused_by_its_key_and_the_run_stays_as_it_was(
    toy: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert toy(run).returncode == 0
    before = (run / "config.json").read_bytes()
    refused = toy(run, "--optimizer", "muon")
    assert refused.returncode == 2 and "Traceback" not in refused.output
    line = refused.output.strip().splitlines()[-1]
    assert "engine.optimizer.name adamw -> muon" in line and "set engine.optimizer.name=adamw" in line
    assert (run / "config.json").read_bytes() == before
    assert toy(run).returncode == 0


def test_a_start_that_differs_names_the_changed_key(toy: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert toy(run).returncode == 0
    refused = toy(run, "--started-from", "b")
    assert refused.returncode == 2
    assert "changed since the last start: started_from a -> b" in refused.output
