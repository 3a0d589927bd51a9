"""A checkpoint of any number of ranks gives one process the weights that its training would export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from base.config import UserError
from engine import checkpoint_export
from engine.checkpoint_folder import CHECKPOINTS, EXPORT

WIDTH, HIDDEN = 6, 8


def model() -> nn.Module:
    """As in scripts/toy_train.py, with other weights."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH))


@pytest.mark.parametrize(("zero", "ranks", "optimizer"), [(1, 3, "adamw"), (2, 2, "muon"), (3, 2, "adamw")])
def test_shards_of_many_ranks_are_the_export_bit_for_bit(
    toy: Any, tmp_path: Path, zero: int, ranks: int, optimizer: str
) -> None:
    options = ["--steps", 4, "--zero", zero, "--optimizer", optimizer, "--streams", 3, "--no-adversary"]
    result = toy(tmp_path, *options, "--ema", 0.9, 0.5, ranks=ranks)
    assert result.returncode == 0, result.output
    directory, state = checkpoint_export.find(tmp_path / CHECKPOINTS, "latest")
    assert state["step"] == 4 and state["num_ranks"] == ranks
    for decay, export in ((0.9, EXPORT), (0.5, f"{EXPORT}_ema_0.5")):
        loaded = model()
        checkpoint_export.load(directory, state, loaded, decay)
        expected = torch.load(tmp_path / export / "model.pt", weights_only=True)
        assert loaded.state_dict().keys() == expected.keys()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name
    with pytest.raises(UserError, match=r"no average with engine.ema_decay 0.7, only \[0.9, 0.5\]"):
        checkpoint_export.load(directory, state, model(), 0.7)
    with pytest.raises(UserError, match="they do not belong together"):
        checkpoint_export.load(directory, state, nn.Linear(WIDTH, WIDTH), 0.9)


def test_a_damaged_checkpoint_is_passed_over_and_a_missing_one_names_those_that_are_there(
    toy: Any, tmp_path: Path
) -> None:
    assert toy(tmp_path, "--steps", 4).returncode == 0
    root = tmp_path / CHECKPOINTS
    with (root / "step_00000004" / "rank_00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert checkpoint_export.find(root, "latest")[1]["step"] == 3
    with pytest.raises(UserError, match=r"'4' .*has a wrong checksum.*; steps that are there: 3, 4"):
        checkpoint_export.find(root, "4")
    with pytest.raises(UserError, match="no good checkpoint '7'; steps that are there: 3, 4"):
        checkpoint_export.find(root, "7")
