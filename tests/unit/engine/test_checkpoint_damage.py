"""What is on the disk is believed only if its checksums say so, and all ranks decide alike. Ranks are threads here."""

import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from base import files
from base.config import UserError
from engine import checkpoint_folder, checkpoint_reader, checkpoint_writer
from engine.checkpoint import Checkpoints
from engine.layout import Segment

WORLD = 3


class ThreadRanks:
    """The collectives of engine.distributed.Ranks between threads."""

    world = WORLD

    def __init__(self, rank, barrier, board):
        self.rank, self.is_first = rank, rank == 0
        self.barrier, self._board = barrier.wait, board

    def gather(self, value):
        self._board[self.rank] = value
        self.barrier()
        values = list(self._board)
        self.barrier()
        return values


def on_all_ranks(root, action, keep=2):
    """action(checkpoints) on every rank at once; its results. The models are empty: only the files matter here."""
    barrier, board = threading.Barrier(WORLD, timeout=20), [None] * WORLD

    def one(rank):
        def say(kind, step, text):
            if rank == 0 and kind == "warning":
                print(text)

        return action(Checkpoints(root, {}, None, ThreadRanks(rank, barrier, board), keep=keep, say=say))

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(one, range(WORLD)))


def save(root, *steps, required=True, background=False):
    def action(checkpoints):
        for step in steps:
            state = {"step": step, "fingerprints": {"data": "a"}, "data": {"cursor": step}}
            checkpoints.save(state, background=background, required=required)
        checkpoints.finish()

    on_all_ranks(root, action)


def loaded_steps(root, oldest=False):
    results = on_all_ranks(root, lambda checkpoints: checkpoints.load({"data": "a"}, oldest=oldest))
    return [result and result[1]["step"] for result in results]


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "rank_00001.safetensors", 7),
    "flipped": lambda folder: flip(folder / "rank_00002.safetensors", 9),
    "missing": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "state.json flipped": lambda folder: flip(
        folder / "state.json", (folder / "state.json").read_text().index('"cursor": 6') + 10
    ),
    "state.json truncated": lambda folder: os.truncate(folder / "state.json", 40),
    "state.json missing": lambda folder: (folder / "state.json").unlink(),
    "state.json no text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
    "state.json no object": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_by_all_ranks(damage, tmp_path, capsys):
    save(tmp_path, 3, 6)
    assert loaded_steps(tmp_path) == [6] * WORLD
    DAMAGES[damage](tmp_path / "step_00000006")
    capsys.readouterr()
    assert loaded_steps(tmp_path) == [3] * WORLD
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "step_00000006 is damaged" in lines[0] and "taking the one before" in lines[0]
    file_name = "state.json" if damage.startswith("state") else "rank_0000"
    assert file_name in lines[0]


def test_every_flipped_bit_of_state_json_is_noticed(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "step_00000003" / "state.json"
    whole = path.read_bytes()
    before = json.loads(whole)
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        state, problem = checkpoint_folder.read_state(path.parent)
        assert problem or state == before, "only white space may change unnoticed"


def test_a_roll_back_takes_the_next_one_if_the_oldest_is_damaged(tmp_path, capsys):
    save(tmp_path, 3, 6)
    (tmp_path / "step_00000003" / "rank_00001.safetensors").write_bytes(b"")
    assert loaded_steps(tmp_path, oldest=True) == [6] * WORLD
    assert "taking the one after" in capsys.readouterr().out


def test_a_run_never_starts_again_from_zero_because_all_is_damaged(tmp_path):
    assert loaded_steps(tmp_path) == [None] * WORLD  # nothing was ever saved
    save(tmp_path, 3)
    (tmp_path / "step_00000003" / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        loaded_steps(tmp_path)


def test_another_format_is_refused_with_its_number(tmp_path):
    files.write_json(tmp_path / "step_00000003" / "state.json", {"format": 1, "step": 3, "num_ranks": 2})
    with pytest.raises(UserError, match="format 1, this code reads 2"):
        loaded_steps(tmp_path)


def test_what_a_killed_save_left_is_never_a_checkpoint(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step_00000003", tmp_path / ".step_00000006.tmp")
    shutil.copytree(tmp_path / "step_00000003", tmp_path / ".step_00000001.old")
    assert loaded_steps(tmp_path) == [3] * WORLD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_the_newest_stay_and_latest_names_the_last(tmp_path):
    save(tmp_path, 3, 6, 9, background=True)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["latest", "step_00000006", "step_00000009"]
    assert (tmp_path / "latest").read_text() == "step_00000009\n"


@pytest.fixture
def full_disk(monkeypatch):
    """The second rank's file no longer fits, whatever thread writes it."""
    write = checkpoint_writer.write

    def failing(path, flats):
        if path.name == "rank_00001.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, flats)

    monkeypatch.setattr(checkpoint_writer, "write", failing)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_one_checkpoint_not_the_training(background, tmp_path, capsys, request):
    save(tmp_path, 3)
    request.getfixturevalue("full_disk")
    save(tmp_path, 6, required=False, background=background)
    (line,) = capsys.readouterr().out.splitlines()
    assert "WARNING: the checkpoint of step 6" in line and "GiB are free" in line
    assert "rank_00001.safetensors: No space left on device" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]
    assert loaded_steps(tmp_path) == [3] * WORLD


def test_the_last_checkpoint_must_fit(tmp_path, full_disk):
    with pytest.raises(UserError, match=r"No space left on device.*make room and run the same command again"):
        save(tmp_path, 3, required=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_at_the_rename_is_noticed_too(tmp_path, monkeypatch, capsys):
    save(tmp_path, 3)

    def failing(directory, state):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(checkpoint_folder, "write_state", failing)
    save(tmp_path, 6, required=False)
    assert "WARNING: the checkpoint of step 6" in capsys.readouterr().out
    assert loaded_steps(tmp_path) == [3] * WORLD


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(tmp_path):
    for name in (".step_00000002.tmp", ".step_00000001.old", "step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    for name in (".latest.123.tmp", "latest"):
        (tmp_path / name).touch()
    checkpoint_folder.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", None),
        ("num_ranks", "3"),
        ("num_ranks", 0),
        ("num_ranks", 1 << 31),
        ("files", {"a": 3}),
        ("engines", []),
    ],
)
def test_a_state_of_another_shape_is_damage_whatever_its_checksum_says(name, value, tmp_path, capsys):
    save(tmp_path, 3, 6)
    directory = tmp_path / "step_00000006"
    state, _ = checkpoint_folder.read_state(directory)
    checkpoint_folder.write_state(directory, {**state, name: value})
    assert loaded_steps(tmp_path) == [3] * WORLD
    assert f"state.json: {name}" in capsys.readouterr().out


def test_a_file_that_is_no_safetensors_is_named_whatever_its_checksum_says(tmp_path):
    for content in (b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"):
        (tmp_path / "rank_00000.safetensors").write_bytes(content)
        with (
            pytest.raises(UserError, match=r"rank_00000.safetensors: is no file|lacks value 0"),
            checkpoint_reader.Saved(tmp_path, ["rank_00000.safetensors"], 0) as saved,
        ):
            saved.fill("main/master", [Segment("weight", 0, 4, 0)], torch.empty(4))
