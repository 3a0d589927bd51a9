"""Whatever operation of a save fails or is the last before a power loss, every checkpoint that is there is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base.config import UserError
from engine import checkpoint_export, checkpoint_folder, checkpoint_writer
from engine.checkpoint import Checkpoints
from engine.checkpoint_reader import Saved
from engine.checkpoint_writer import Flat
from engine.layout import Segment
from helpers.recorded_disk import check_order_of_writing

NUM_VALUES = 5000  # more than Python's buffer of 8 KiB: several writes


class OneRank:
    """What engine.distributed.Ranks gives to the only rank."""

    rank, world, is_first = 0, 1, True

    def gather(self, value):
        return [value]

    def barrier(self):
        pass


class OfOneTensor(Checkpoints):
    """Checkpoints of a model of one tensor, whose values are the step."""

    value = 0

    def _flats(self):
        values = torch.full((NUM_VALUES,), float(self.value))
        return [Flat("main/master", values, [Segment("weight", 0, NUM_VALUES, 0)])]


def checkpoints_of(root: Path, keep: int) -> OfOneTensor:
    return OfOneTensor(root / "run/checkpoints", {}, None, OneRank(), keep=keep, say=lambda *_: None)


def save(root: Path, *steps: int, keep: int = 2, background: bool = False) -> None:
    """Goes on from what is there, as a training does, and saves `steps`."""
    checkpoints = checkpoints_of(root, keep)
    checkpoints._restore = lambda directory, state: None
    checkpoints.load({"data": "a"})
    for step in steps:
        checkpoints.value = step
        checkpoints.save({"step": step, "fingerprints": {"data": "a"}}, background=background, required=True)
    checkpoints.finish(required=True)


def assert_whole(directory: Path) -> None:
    state, problem = checkpoint_folder.read_state(directory)
    assert not problem, f"{directory.name}: {problem}"
    for name, expected in checkpoint_folder.sums(state).items():
        assert not checkpoint_writer.checked(directory / name, expected), f"{directory.name}: {name}"
    values = torch.empty(NUM_VALUES)
    with Saved(directory, [checkpoint_folder.file_name(0)], 0) as saved:
        saved.fill("main/master", [Segment("weight", 0, NUM_VALUES, 0)], values)
    step = checkpoint_folder.step_of(directory)
    assert state["step"] == step and values.eq(step).all(), f"{directory.name} holds another step's values"


def whole_steps(root: Path) -> list[int]:
    """Steps of the checkpoints that are there. Each must be whole, and `latest` must name one of them."""
    folder = root / "run/checkpoints"
    found = checkpoint_folder.all_in(folder)
    for directory in found:
        assert_whole(directory)
    if found:
        assert checkpoint_export.find(folder, "latest")[0] == found[-1]
    if (latest := folder / "latest").exists():
        assert (folder / latest.read_text().strip()).is_dir(), f"latest names {latest.read_text()!r}"
    return [checkpoint_folder.step_of(directory) for directory in found]


@pytest.mark.parametrize("background", [False, True])
def test_the_first_checkpoint_is_there_or_not(background, tmp_path):
    def judge(root):
        return {(): "nothing", (3,): "new"}[tuple(whole_steps(root))]

    check_order_of_writing(
        tmp_path,
        lambda root: None,
        lambda root: save(root, 3, background=background),
        judge,
        allowed=("nothing", "new"),
    )


def test_a_save_and_the_removal_of_the_oldest_leave_whole_checkpoints_only(tmp_path):
    """Two stay; between the save and the removal there are three."""

    def judge(root):
        steps = whole_steps(root)
        assert steps in ([3, 6], [3, 6, 9], [6, 9]), f"steps {steps}"
        return "old" if steps[-1] == 6 else "new"

    check_order_of_writing(tmp_path, lambda root: save(root, 3, 6), lambda root: save(root, 9), judge)


def test_a_damaged_checkpoint_is_replaced_and_the_one_before_stays(tmp_path):
    def prepare(root):
        save(root, 3, 6)
        (root / "run/checkpoints/step_00000006/rank_00000.safetensors").write_bytes(b"cut")

    def judge(root):
        directory, state = checkpoint_export.find(root / "run/checkpoints", "latest")
        assert_whole(directory)
        assert (root / "run/checkpoints/step_00000003").is_dir()
        return "new" if state["step"] == 6 else "old"

    check_order_of_writing(tmp_path, prepare, lambda root: save(root, 6), judge)


def test_a_roll_back_leaves_its_checkpoint_with_the_old_or_the_new_state(tmp_path):
    def prepare(root):
        save(root, 3, 6, 9, keep=3)

    def roll_back(root):
        directory = root / "run/checkpoints/step_00000003"
        state, problem = checkpoint_folder.read_state(directory)
        if problem:
            raise UserError(problem)
        checkpoints_of(root, 3).keep_alone(directory, {**state, "rolled_back": 1})

    def judge(root):
        steps = whole_steps(root)
        state, _ = checkpoint_folder.read_state(root / "run/checkpoints/step_00000003")
        assert steps[0] == 3
        return "new" if state.get("rolled_back") and steps == [3] else "between" if len(steps) < 3 else "old"

    check_order_of_writing(tmp_path, prepare, roll_back, judge, allowed=("old", "between", "new"))
