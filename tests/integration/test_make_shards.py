"""launch/make_shards.py as a person runs it: bytes, resumption, rejections, one line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data.shards import ShardDataset
from helpers.commands import in_process
from helpers.trees import tree
from launch import make_shards
from launch.runs import entry
from quickstart import make_data

SMALL = [
    "train_scenes=60",
    "validation_scenes=5",
    "train_edits=30",
    "validation_edits=4",
    "num_identities=6",
    "train_identities=12",
    "validation_identities=6",
    "max_samples_per_shard=25",
]
NAMES = [f"{kind}-{split}" for kind in ("scenes", "edits", "identities") for split in ("train", "validation")]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs make_shards, or make_data, in this process; returns (exit status, stdout, stderr)."""
    return partial(in_process, monkeypatch, capsys, main=make_shards.main)


def start(out: Path, *arguments: str) -> subprocess.Popen:
    script = entry.REPOSITORY / "quickstart/make_data.py"
    environment = {**os.environ, "PYTHONPATH": str(entry.REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, script, "--out", out, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """The small emoji data set, made by the literal command with two processes."""
    out = tmp_path_factory.mktemp("emoji") / "data"
    process = start(out, *SMALL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "scenes-train: read 60 = written 60 + rejected 0" in stdout
    assert "117 items" in stderr and "100%" in stderr
    return out


def test_emoji_makes_six_sound_data_sets(emoji, command):
    assert sorted(path.name for path in emoji.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert command("verify", emoji / name)[0] == 0
        dataset = ShardDataset.open(emoji / name)
        assert "CC-BY 4.0" in dataset.manifest.source
    (sample,) = ShardDataset.open(emoji / "edits-train").read([0])
    assert sorted(sample.parts) == ["json", "source.png", "target.png"]


def test_plain_webdataset_reads_the_scenes(emoji):
    shards = sorted(str(path) for path in (emoji / "scenes-train").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert len(samples) == 60
    assert samples[0]["__key__"] == "scene-000000" and samples[0]["png"].size == (64, 64)


def test_bytes_do_not_depend_on_the_number_of_processes(emoji, command, tmp_path):
    assert command("--out", tmp_path, "--processes", "1", *SMALL, main=make_data.main)[0] == 0
    assert tree(tmp_path) == tree(emoji)


def test_killed_run_continues_and_gives_the_same_bytes(emoji, command, tmp_path):
    process = start(tmp_path, "--processes", "1", *SMALL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("edits-train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # the worker notices that its parent is gone
    assert command("--out", tmp_path, "--processes", "1", *SMALL, main=make_data.main)[0] == 0
    assert tree(tmp_path) == tree(emoji)


def test_another_config_does_not_continue_these_shards(emoji, command):
    before = tree(emoji)
    status, _, err = command("--out", emoji, "--processes", "1", *SMALL, "seed=1", main=make_data.main)
    assert status == 2 and err.splitlines()[-1].startswith("error: ") and "empty directory" in err
    assert tree(emoji) == before


def test_mistyped_key_is_one_line(command, tmp_path):
    status, out, err = command("--out", tmp_path / "out", "train_scene=5", main=make_data.main)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and "train_scenes" in err
    assert not (tmp_path / "out").exists()


def test_verify_names_a_damaged_shard(command, tmp_path, folder):
    assert command("folder", "--images", folder, "--out", tmp_path / "out")[0] == 0
    shard = tmp_path / "out/shard-000000.tar"
    payload = bytearray(shard.read_bytes())
    payload[700] ^= 1
    shard.write_bytes(payload)
    status, _, err = command("verify", tmp_path / "out")
    assert status == 2 and "shard-000000.tar" in err


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four images of two formats with captions beside them."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.png", "PNG"), ("deep/d.JPEG", "JPEG")):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 30), "red").save(buffer, kind)
        (images / name).write_bytes(buffer.getvalue())
        (images / name).with_suffix(".txt").write_text(f"picture {name}\n")
    return images


def test_folder_keeps_the_files_and_their_captions(command, folder, tmp_path):
    status, out, _ = command("folder", "--images", folder, "--out", tmp_path / "out")
    assert status == 0 and "read 4 = written 4 + rejected 0" in out
    samples = ShardDataset.open(tmp_path / "out").read(range(4))
    assert samples[0].parts["png"] == (folder / "a.png").read_bytes()
    assert samples[3].parts["jpg"] == (folder / "deep/d.JPEG").read_bytes()
    captions = [json.loads(sample.parts["json"])["caption"] for sample in samples]
    assert captions == ["picture a.png", "picture b.jpg", "picture c.png", "picture deep/d.JPEG"]


def test_folders_of_classes_are_labelled_in_sorted_order(command, folder, tmp_path):
    for name, target in (("b.jpg", "n02/b.jpg"), ("c.png", "n01/c.png")):
        (folder / target).parent.mkdir()
        (folder / name).rename(folder / target)
    assert command("folder", "--images", folder, "--labels", "--out", tmp_path / "out")[0] == 0
    samples = ShardDataset.open(tmp_path / "out").read(range(3))
    assert [json.loads(sample.parts["json"]) for sample in samples] == [
        {"label": 0, "class": "deep", "file": "deep/d.JPEG"},
        {"label": 1, "class": "n01", "file": "n01/c.png"},
        {"label": 2, "class": "n02", "file": "n02/b.jpg"},
    ], "a.png lies in no class"
    arguments = ("--images", folder, "--labels", "--captions", tmp_path / "x", "--out", tmp_path / "other")
    assert "not both" in command("folder", *arguments)[2]


def test_folder_takes_captions_from_jsonl_in_its_order(command, folder, tmp_path):
    entries = [{"file": "c.png", "caption": "third"}, {"file": "a.png", "caption": "first"}]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(item) + "\n" for item in entries))
    assert command("folder", "--images", folder, "--captions", captions, "--out", tmp_path / "out")[0] == 0
    samples = ShardDataset.open(tmp_path / "out").read(range(2))
    assert [json.loads(sample.parts["json"])["caption"] for sample in samples] == ["third", "first"]


def cut(folder: Path) -> None:
    path = folder / "b.jpg"
    path.write_bytes(path.read_bytes()[:300])


BAD = {
    "corrupt image": (cut, "unreadable image: "),
    "empty caption": (lambda folder: (folder / "b.txt").write_text(" \n"), "no caption: "),
    "no caption": (lambda folder: (folder / "b.txt").unlink(), "no caption: "),
}


@pytest.mark.parametrize("case", BAD)
def test_strict_stops_at_a_bad_item_with_one_line_and_nothing_half_written(command, folder, tmp_path, case):
    spoil, message = BAD[case]
    spoil(folder)
    status, out, err = command("folder", "--images", folder, "--out", tmp_path / "out", "--strict")
    assert status == 2 and out == "" and message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("case", BAD)
def test_bad_item_is_listed_with_its_reason(command, folder, tmp_path, case):
    spoil, message = BAD[case]
    spoil(folder)
    status, out, _ = command("folder", "--images", folder, "--out", tmp_path / "out")
    assert status == 0 and f"read 4 = written 3 + rejected 1 ({message[:-2]} 1)" in out
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert rejected["key"] == "image-000000001" and message in rejected["reason"]
    assert command("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("line", ["not json", '{"file": "a.png"}', "[1]", '{"file": 3, "caption": "x"}'])
def test_bad_jsonl_line_is_named(command, folder, tmp_path, line):
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"file": "a.png", "caption": "x"}\n' + line + "\n")
    arguments = ("--images", folder, "--captions", captions, "--out", tmp_path / "out", "--strict")
    status, _, err = command("folder", *arguments)
    assert status == 2 and "captions.jsonl" in err and "2" in err


def test_missing_folder_is_one_line(command, tmp_path):
    status, _, err = command("folder", "--images", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1 and "no such folder" in err
