"""Shards (docs/architecture.md, 1) are whole or absent; a killed writer continues exactly. Damage: test_verify.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from base.config import UserError
from data.shards import (
    LatentInfo,
    Sample,
    ShardDataset,
    ShardWriter,
    finished_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from data.shards import file as shard_file
from data.shards import reader as shard_reader
from data.shards.file import OpenShard

SOURCE = "test"
PER_SHARD = 4


def make_sample(number: int) -> Sample:
    payload = np.random.default_rng(number).bytes(300 + 137 * number)
    return Sample(
        f"item{number:04d}", {"png": payload, "json": json.dumps({"caption": f"n {number}"}).encode()}
    )


def write_items(directory: Path, count: int, stop_before: int | None = None) -> int:
    """A deterministic source of `count` items, every seventh rejected. Returns how many it skipped."""
    with ShardWriter(directory, max_samples_per_shard=PER_SHARD, source=SOURCE) as writer:
        skipped = writer.num_consumed
        for number in range(skipped, count):
            if number == stop_before:
                raise KeyboardInterrupt
            if number % 7 == 6:
                writer.reject(f"item{number:04d}", "seventh")
            else:
                writer.write(make_sample(number), num_image_tokens=16, num_text_tokens=number)
    return skipped


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_items(tmp_path / "set", 20)
    return tmp_path / "set"


def test_what_was_written_is_read_in_any_order(shards: Path) -> None:
    dataset = ShardDataset.open(shards)
    kept = [number for number in range(20) if number % 7 != 6]
    assert len(dataset) == len(kept)
    order = np.random.default_rng(0).permutation(len(kept)).tolist()
    order += [3, 3]
    assert dataset.read(order) == [make_sample(kept[index]) for index in order]
    assert dataset.num_text_tokens.tolist() == kept
    assert set(dataset.num_image_tokens.tolist()) == {16}
    assert len(set(dataset.key_hashes.tolist())) == len(kept)
    assert dataset.read([0])[0].shard.endswith("shard-000000.tar")


def test_neighbours_are_read_with_one_pread(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ShardDataset.open(shards)
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: calls.append(arguments) or preadv(*arguments))
    dataset.read([2, 0, 1, 3, 4, 5, 9])  # shard 0 whole, two neighbours in shard 1, one in shard 2
    assert len(calls) == 3


def test_stock_webdataset_opens_our_shards(shards: Path) -> None:
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = [(item["__key__"], item["png"]) for item in webdataset.WebDataset(urls, shardshuffle=False)]
    ours = ShardDataset.open(shards)
    assert theirs == [(sample.key, sample.parts["png"]) for sample in ours.read(range(len(ours)))]


def test_tar_is_ustar_without_traces_of_this_machine(shards: Path) -> None:
    with tarfile.open(shards / shard_name(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert not member.pax_headers
    assert (shards / shard_name(0)).read_bytes()[257:263] == b"ustar\0"


@pytest.mark.parametrize("stop_before", [0, 2, 5, 6, 7, 14, 19])
def test_resumed_writer_gives_the_same_bytes(tmp_path: Path, stop_before: int) -> None:
    write_items(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        write_items(tmp_path / "resumed", 20, stop_before)
    with pytest.raises(UserError, match="no such data set"):
        ShardDataset.open(tmp_path / "resumed")
    skipped = write_items(tmp_path / "resumed", 20)
    assert stop_before - 2 * PER_SHARD < skipped <= stop_before
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_writing_again_changes_nothing(shards: Path) -> None:
    before = contents(shards)
    assert write_items(shards, 20) == 20
    assert contents(shards) == before


def test_every_input_is_written_or_rejected_with_a_reason(shards: Path) -> None:
    rejected = [json.loads(line) for line in (shards / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [{"key": "item0006", "reason": "seventh"}, {"key": "item0013", "reason": "seventh"}]
    manifest = ShardDataset.open(shards).manifest
    assert (manifest.num_samples, manifest.num_rejected) == (18, 2)


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
import test_shards
from data.shards import ShardWriter
with ShardWriter(Path(sys.argv[1]), max_samples_per_shard=4, source="test") as writer:
    for number in range(6):
        writer.write(test_shards.make_sample(number), 16, number)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    here = Path(__file__).parent
    program = KILLED_WRITER.format(root=str(here.parents[1]), here=str(here))
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    visible = sorted(path.name for path in (tmp_path / "killed").iterdir() if not path.name.startswith("."))
    assert visible == ["shard-000000.index.npy", "shard-000000.json", "shard-000000.tar"]
    write_items(tmp_path / "killed", 20)
    write_items(tmp_path / "whole", 20)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_fingerprint_depends_on_content_and_order_only(tmp_path: Path, shards: Path) -> None:
    write_items(tmp_path / "again", 20)
    write_items(tmp_path / "longer", 21)
    fingerprint = ShardDataset.open(shards).fingerprint
    assert ShardDataset.open(tmp_path / "again").fingerprint == fingerprint
    assert ShardDataset.open(tmp_path / "longer").fingerprint != fingerprint


def test_a_shard_lost_later_is_written_again(tmp_path: Path, shards: Path) -> None:
    before = contents(shards)
    (shards / shard_name(1)).unlink()
    write_items(shards, 20)
    assert contents(shards) == before


def test_nothing_written_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"no sample written, 1 rejected; see .*rejected\.jsonl"),
        ShardWriter(tmp_path, max_samples_per_shard=4, source=SOURCE) as writer,
    ):
        writer.reject("a", "too dark")
    assert "too dark" in (tmp_path / "rejected.jsonl").read_text()


def test_other_source_in_the_same_directory_is_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="was made from 'test', not 'other'"):
        ShardWriter(shards, max_samples_per_shard=4, source="other")
    with pytest.raises(UserError, match="was made from 'test', not 'other'"):
        finished_shard(shards / shard_name(0), source="other")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", {"json": b"{}"}), "key 'a.b'"),
        (Sample("", {"json": b"{}"}), "key ''"),
        (Sample("a", {"JSON": b"{}"}), "part name 'JSON'"),
        (Sample("a", {"json": b""}), "part 'json' has 0 bytes"),
        (Sample("a", {"x" * 33: b"x"}), "up to 32 of"),
        (Sample("a", {}), "0 parts"),
        (Sample("seen", {"json": b"{}"}), "key 'seen': used twice"),
    ],
)
def test_samples_that_webdataset_cannot_carry_are_refused(
    tmp_path: Path, sample: Sample, message: str
) -> None:
    seen = Sample("seen", {"json": b"{}"})
    with pytest.raises(UserError, match=message):
        write_shard(tmp_path / shard_name(0), [seen, sample], [(0, 0)] * 2, source=SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_key_used_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / shard_name(number), [Sample("a", {"json": b"{}"})], [(0, 0)], source=SOURCE)
    with pytest.raises(UserError, match="1 keys used twice"):
        write_manifest(tmp_path, [shard_name(0), shard_name(1)], source=SOURCE)


def test_transient_read_errors_are_tried_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ShardDataset.open(shards)
    preadv, failures = os.preadv, [OSError("stale handle"), OSError("stale handle")]

    def flaky(*arguments: int) -> bytes:
        if failures:
            raise failures.pop()
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", flaky)
    monkeypatch.setattr(shard_reader, "RETRY_WAIT_S", 0.0)
    assert dataset.read([0]) == [make_sample(0)]
    failures += [OSError("disk on fire")] * 3
    with pytest.raises(UserError, match=r"shard-000000.tar: cannot be read .disk on fire."):
        dataset.read([0])


def test_short_reads_are_completed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, views, offset: preadv(number, [views[0][:100]], offset))
    assert ShardDataset.open(shards).read([1]) == [make_sample(1)]


def test_latent_info_survives_the_manifest(tmp_path: Path) -> None:
    latent = LatentInfo("bf16", (2, 4, 4), (0.1, -0.25), (1.0, 2.0), "autoencoder", "text")
    with ShardWriter(tmp_path, max_samples_per_shard=4, source=SOURCE, latent=latent) as writer:
        writer.write(Sample("a", {"latent": bytes(64), "json": b"{}"}), num_image_tokens=16)
    assert ShardDataset.open(tmp_path).manifest.latent == latent


def test_a_stop_while_a_shard_is_replaced_leaves_an_unfinished_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / shard_name(0)
    samples = [Sample(f"s{number}", {"txt": b"text"}) for number in range(2)]
    shard = OpenShard(path)
    for sample in samples:
        shard.add(sample)
    shard.close("test", ())
    size = path.stat().st_size
    shard = OpenShard(path)
    shard.add(samples[1])

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_file, "write_index", stopped)
    with pytest.raises(KeyboardInterrupt):
        shard.close("test", (("s0", "duplicate: of s1"),), 2)
    assert path.stat().st_size == size, "nothing but the side file tells them apart"
    assert finished_shard(path, source="test") is None
