"""launch/make_shards.py for each large source, as a person runs it on files of the published schemas."""

import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data.shards import ShardDataset
from data.sources import write
from helpers.commands import in_process
from launch import make_shards
from launch.runs import entry


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs make_shards in this process; returns (exit status, stdout, stderr)."""
    return partial(in_process, monkeypatch, capsys, main=make_shards.main)


def picture(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).resize((6, 6)).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def url(number: int) -> str:
    return f"https://example.org/{number}.jpg"


def write_cc12m(folder: Path) -> tuple[Path, Path]:
    """Two tars of 6 samples as img2dataset writes them, and captions for all but number 3."""
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for number in range(6 * shard, 6 * shard + 6):
                size = (20, 16) if number == 7 else (40, 30)
                tree = {"url": url(number), "key": f"{number:09d}", "width": size[0], "exif": "{}"}
                image = picture(5 if number == 9 else number, size)
                sample = {"jpg": image, "txt": f"alt {number}".encode(), "json": json.dumps(tree).encode()}
                tar.write({"__key__": f"{number:09d}", **sample})
    captions = folder.parent / "train.jsonl.gz"
    rows = [
        {
            "url": url(number),
            "key": f"{number:09d}",
            "caption": f"alt {number}",
            "caption_llava": f"a long text about {number}",
            "caption_llava_short": f"text {number}",
        }
        for number in range(12)
        if number != 3
    ]
    with gzip.open(captions, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder, captions


def test_cc12m_is_joined_filtered_fitted_and_deduplicated(command, tmp_path):
    tars, captions = write_cc12m(tmp_path / "tars")
    arguments = ["cc12m", "--tars", tars, "--captions", captions, "--resolution", 24, "--deduplicate", 0]
    status, out, err = command(*arguments, "--out", tmp_path / "out", "--processes", 2)
    assert status == 0, err
    assert "read 12 = written 9 + rejected 3" in out
    assert all(f"{kind} 1" in out for kind in ("no caption", "too small", "duplicate"))
    dataset = ShardDataset.open(tmp_path / "out")
    samples = dataset.read(range(len(dataset)))
    tree = json.loads(samples[0].parts["json"])
    assert tree["captions"] == {"llava": "a long text about 0", "llava_short": "text 0", "alt": "alt 0"}
    assert (tree["url"], tree["width"], tree["height"]) == (url(0), 40, 30)
    assert "exif" not in tree
    assert Image.open(io.BytesIO(samples[0].parts["jpg"])).size == (24, 24)
    assert command("doctor", tmp_path / "out", "--images-per-pack", 2, "--streams", 2)[0] == 0
    page = (tmp_path / "out/doctor.html").read_text()
    assert "a long text about" in page
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {item["key"] for item in rejected} == {"00000-000000003", "00001-000000007", "00001-000000009"}


def test_several_nodes_give_the_bytes_of_one(command, tmp_path):
    tars, captions = write_cc12m(tmp_path / "tars")
    arguments = ["cc12m", "--tars", tars, "--captions", captions]
    assert command(*arguments, "--out", tmp_path / "one", "--processes", 1)[0] == 0
    script = [
        sys.executable,
        entry.REPOSITORY / "launch/make_shards.py",
        *arguments,
        "--out",
        tmp_path / "two",
    ]
    nodes = [subprocess.Popen([*map(str, script), "--node", str(n), "--nodes", "2"]) for n in range(2)]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if path.suffix != ".sqlite")
    assert "manifest.json" in names and "shard-000001.tar" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_node_0_waits_for_the_others(tmp_path, monkeypatch, capsys, command):
    tars, _ = write_cc12m(tmp_path / "tars")
    arguments = ["webdataset", "--tars", tars, "--out", tmp_path / "out", "--processes", 1, "--nodes", 2]
    first: list = []
    waiting = threading.Thread(target=lambda: first.append(start(*arguments, "--node", 0)))
    waiting.start()
    waiting.join(timeout=8)
    assert waiting.is_alive() and not (tmp_path / "out/manifest.json").exists()
    assert start(*arguments, "--node", 1) == 0
    waiting.join(timeout=60)
    assert first == [0]
    assert len(ShardDataset.open(tmp_path / "out")) == 12


def start(*arguments) -> int:
    script = [sys.executable, entry.REPOSITORY / "launch/make_shards.py", *arguments]
    return subprocess.run(list(map(str, script)), check=False, capture_output=True).returncode


def test_a_damaged_tar_is_named_the_others_are_kept_and_the_same_command_finishes(command, tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    whole = (tars / "00000.tar").read_bytes()
    with tarfile.open(tars / "00000.tar") as tar:
        boundary = tar.getmembers()[6].offset  # stock readers take this for the end
    (tars / "00000.tar").write_bytes(whole[:boundary])
    arguments = ["webdataset", "--tars", tars, "--out", tmp_path / "out", "--processes", 1]
    status, _, err = command(*arguments)
    assert status == 2 and "1 of 2 inputs could not be used, the others are done: " in err
    assert "00000.tar" in err and not (tmp_path / "out/manifest.json").exists()
    assert (tmp_path / "out/shard-000001.json").exists()
    (tars / "00000.tar").write_bytes(whole)
    status, _, err = command(*arguments)
    # The tar has another size now, so this is another source: said in one line, and an empty folder is asked for.
    assert status == 2 and "use an empty directory" in err


def test_omniedit_keeps_instructions_and_filters_by_score(command, tmp_path):
    rows = {
        "omni_edit_id": [f"task_obj_add_{number}" for number in range(6)],
        "task": ["addition", "removal"] * 3,
        "src_img": [{"bytes": picture(number), "path": None} for number in range(6)],
        "edited_img": [{"bytes": picture(100 + number), "path": None} for number in range(6)],
        "edited_prompt_list": [[f"add a hat {number}", "put a hat on"] for number in range(6)],
        "width": [40] * 6,
        "height": [30] * 6,
        "sc_score_1": [9.0] * 6,
        "sc_score_2": [9.0] * 6,
        "pq_score": [8.0] * 6,
        "o_score": [9.5, 8.5, 9.0, 3.0, 10.0, 9.9],
        "sc_reasoning": ["because"] * 6,
        "pq_reasoning": ["because"] * 6,
    }
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "hub/train-00000.parquet", row_group_size=2)
    arguments = ["omniedit", "--files", tmp_path / "hub", "--out", tmp_path / "out", "--processes", 1]
    status, out, err = command(*arguments, "--min-score", "o_score=9", "--max-samples-per-shard", 2)
    assert status == 0, err
    assert "read 6 = written 4 + rejected 2 (score 2)" in out
    dataset = ShardDataset.open(tmp_path / "out")
    (sample,) = dataset.read([0])
    tree = json.loads(sample.parts["json"])
    assert tree["instructions"] == ["add a hat 0", "put a hat on"] and tree["task"] == "addition"
    assert sample.parts["source.jpg"] == picture(0) and sample.parts["target.jpg"] == picture(100)
    assert "o_score=9" in command(*arguments, "--min-score", "o_score")[2]


def write_imagenet(path: Path) -> None:
    with tarfile.open(path, "w") as outer:
        for synset in range(1000):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                info = tarfile.TarInfo(f"n{synset:08d}_1.JPEG")
                payload = picture(synset % 7)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
            info = tarfile.TarInfo(f"n{synset:08d}.tar")
            info.size = len(inner.getvalue())
            outer.addfile(info, io.BytesIO(inner.getvalue()))


def test_imagenet_is_labelled_and_shuffled_over_classes(command, tmp_path):
    write_imagenet(tmp_path / "ILSVRC2012_img_train.tar")
    arguments = ["imagenet", "--tars", tmp_path / "ILSVRC2012_img_train.tar", "--max-samples-per-shard", 250]
    status, out, err = command(*arguments, "--out", tmp_path / "out")
    assert status == 0 and "read 1000 = written 1000 + rejected 0" in out, err
    dataset = ShardDataset.open(tmp_path / "out")
    trees = [json.loads(sample.parts["json"]) for sample in dataset.read(range(1000))]
    assert sorted(tree["label"] for tree in trees) == list(range(1000))
    assert all(tree["class"] == f"n{tree['label']:08d}" for tree in trees)
    assert max(tree["label"] for tree in trees[:100]) > 500, "classes are mixed"


def test_others_shards_are_indexed_in_place(command, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "theirs-%04d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(5):
            tree = json.dumps({"caption": f"text {number}"}).encode()
            writer.write({"__key__": f"item{number}", "jpg": picture(number), "json": tree})
    status, out, err = command("index", tmp_path)
    assert status == 0 and "5 samples in 2 shards" in out, err
    assert [sample.key for sample in ShardDataset.open(tmp_path).read(range(5))] == [
        f"item{n}" for n in range(5)
    ]
    assert command("verify", tmp_path)[0] == 0


def test_doctor_names_damage_and_writes_the_quarantine(command, tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    assert command("webdataset", "--tars", tars, "--out", tmp_path / "out", "--processes", 1)[0] == 0
    shard = tmp_path / "out/shard-000001.tar"
    payload = bytearray(shard.read_bytes())
    payload[700] ^= 1
    shard.write_bytes(payload)
    quarantine = tmp_path / "quarantine.jsonl"
    status, out, err = command(
        "doctor", tmp_path / "out", "--quarantine", quarantine, "--out", tmp_path / "page.html"
    )
    assert status == 2 and "page.html" in err and "shard-000001.tar" in out
    assert [json.loads(line)["key"] for line in quarantine.read_text().splitlines()] == ["00001-000000006"]


# Mistakes -----------------------------------------------------------------------------------------


def script(*arguments) -> list[str]:
    return [sys.executable, str(entry.REPOSITORY / "launch/make_shards.py"), *map(str, arguments)]


def only_line(status: int, err: str) -> str:
    (line,) = [line for line in err.splitlines() if not line.startswith(("1 shards", "2 shards"))]
    assert status == 2 and line.startswith("error: ")
    return line


def test_out_among_the_inputs_or_no_folder_is_one_line(command, tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    status, _, err = command("webdataset", "--tars", tars, "--out", tars / "out")
    assert "its shards would be read as input" in only_line(status, err)
    (tmp_path / "file").write_text("")
    status, _, err = command("webdataset", "--tars", tars, "--out", tmp_path / "file")
    assert "no folder to write to" in only_line(status, err)


def test_strict_names_the_item(command, tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    status, _, err = command(
        "webdataset", "--tars", tars, "--out", tmp_path / "out", "--min-px", 20, "--strict"
    )
    assert "00001-000000007: too small" in only_line(status, err)


def test_a_full_disk_is_one_line_and_the_same_command_finishes(tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    arguments = script("webdataset", "--tars", tars, "--out", tmp_path / "out", "--processes", 1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    full = subprocess.run(arguments, check=False, capture_output=True, text=True, preexec_fn=limit)
    assert "cannot be written" in only_line(full.returncode, full.stderr)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".tmp")]
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
    assert len(ShardDataset.open(tmp_path / "out")) == 12


def test_two_commands_do_not_write_one_folder(command, tmp_path, monkeypatch):
    tars, _ = write_cc12m(tmp_path / "tars")
    monkeypatch.setattr(write, "LOCK_WAIT_S", 0.0)
    with write._only_writer(tmp_path / "out", 0):
        status, _, err = command("webdataset", "--tars", tars, "--out", tmp_path / "out")
    assert "another command writes here as node 0" in only_line(status, err)


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path):
    make_data = entry.REPOSITORY / "quickstart/make_data.py"
    options = ["--out", str(tmp_path / "out"), "--processes", "2", "max_samples_per_shard=50"]
    arguments = [sys.executable, str(make_data), *options]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "out").rglob("shard-*.json")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command goes on from here" and "Traceback" not in err


def test_a_late_node_leaves_shards_alone_that_lose_their_duplicates(command, tmp_path):
    tars, _ = write_cc12m(tmp_path / "tars")
    arguments = [
        "webdataset",
        "--tars",
        tars,
        "--out",
        tmp_path / "out",
        "--deduplicate",
        0,
        "--processes",
        1,
    ]
    assert command(*arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/.deduplicating").touch()
    (tmp_path / "out/shard-000001.json").unlink()  # as for a moment while it is rewritten
    assert command(*arguments, "--nodes", 2, "--node", 1)[0] == 0
    assert not (tmp_path / "out/shard-000001.json").exists()
    assert command(*arguments)[0] == 0  # node 0 was killed there, and goes on
    assert {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name in before
    } == before
