"""A shard and a data set are whole or unfinished, whatever operation of their writer fails or is the last one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from base import files
from base.config import UserError
from data.shards import Sample, ShardDataset, ShardWriter, finished_shard, write_manifest, write_shard
from data.shards.index import MANIFEST_NAME, index_name
from data.shards.verification import verify
from helpers.recorded_disk import RecordedDisk, check_order_of_writing

SOURCE, NAME = "test", "shard-000000.tar"
OLD, NEW = b"o" * 900, b"n" * 900  # of one size: the two tars and indices differ in nothing but their bytes


def samples_of(payload: bytes, numbers: range = range(3)) -> list[Sample]:
    return [Sample(f"k{number}", {"json": b"{}", "png": payload}) for number in numbers]


def write(root: Path, payload: bytes) -> None:
    write_shard(
        root / "set" / NAME, samples_of(payload), [(1, 2)] * 3, source=SOURCE, rejected=(("bad", "small"),)
    )


def write_set(root: Path, payload: bytes) -> None:
    write(root, payload)
    write_manifest(root / "set", [NAME], source=SOURCE)


def read_shard(root: Path) -> str:
    """What the writer that continues counts on: the side file speaks for a tar that has its bytes."""
    path = root / "set" / NAME
    progress = finished_shard(path, source=SOURCE)
    if progress is None:
        return "unfinished"
    assert progress.entry is not None and progress.num_read == 4
    assert files.sha256(path) == progress.entry.sha256, "the side file counts a tar that has other bytes"
    words = {"old": OLD, "new": NEW}
    (word,) = (word for word, payload in words.items() if payload in path.read_bytes())
    records = np.load(path.with_name(index_name(NAME)))
    assert len(records) == 3
    return word


def read_set(root: Path) -> str:
    """What a training finds: the samples of one of the two sets, or a line that refuses them."""
    read_shard(root)
    try:
        data = ShardDataset.open(root / "set")
        read = data.read(range(len(data)))
    except UserError:
        assert verify(root / "set") or not (root / "set" / MANIFEST_NAME).exists()
        return "unfinished"
    if verify(root / "set"):
        return "unfinished"
    words = {"old": samples_of(OLD), "new": samples_of(NEW)}
    return next(word for word, samples in words.items() if read == samples)


@pytest.mark.parametrize("before", ["nothing", "another shard"])
def test_a_shard_is_whole_or_unfinished_after_any_failure_and_power_loss(before, tmp_path) -> None:
    operations = check_order_of_writing(
        tmp_path,
        lambda root: write(root, OLD) if before == "another shard" else None,
        lambda root: write(root, NEW),
        read_shard,
        allowed=("old", "unfinished", "new") if before == "another shard" else ("unfinished", "new"),
    )
    assert len([operation for operation in operations if operation.startswith("rename")]) == 3


def test_a_data_set_that_is_written_again_is_whole_or_refused(tmp_path) -> None:
    check_order_of_writing(
        tmp_path,
        lambda root: write_set(root, OLD),
        lambda root: write_set(root, NEW),
        read_set,
        allowed=("old", "unfinished", "new"),
    )


def test_a_set_that_grows_is_the_smaller_or_the_larger_one(tmp_path) -> None:
    """The writer continues what it finds, so the shards before stay, and the manifest decides."""

    def grow(root: Path, count: int) -> None:
        with ShardWriter(root / "set", max_samples_per_shard=2, source=SOURCE) as writer:
            for sample in samples_of(OLD, range(writer.num_consumed, count)):
                writer.write(sample)

    def judge(root: Path) -> str:
        assert verify(root / "set") == []
        data = ShardDataset.open(root / "set")
        assert data.read(range(len(data))) == samples_of(OLD, range(len(data)))
        return {2: "old", 4: "new"}[len(data)]

    check_order_of_writing(tmp_path, lambda root: grow(root, 2), lambda root: grow(root, 4), judge)


@pytest.mark.parametrize("byte", [0, 150, 512, 1100, 2600])  # headers and payloads of two samples
@pytest.mark.parametrize("written", ["tar", "index"])
def test_a_wrong_bit_on_the_disk_is_noticed_before_the_shard_counts(written, byte, tmp_path) -> None:
    clean, damaged = tmp_path / "clean", tmp_path / "damaged"
    for root in (clean, damaged):
        root.mkdir()
    disk = RecordedDisk(clean)
    with disk.recording():
        write(clean, NEW)
    writes = [number for number, operation in enumerate(disk.operations) if operation.startswith("write")]
    number = writes[["tar", "index"].index(written)]
    size = int(disk.operations[number].split()[1])
    with RecordedDisk(damaged, flip_at=(number, byte % (size - 1))).recording():
        if written == "tar":
            with pytest.raises(UserError, match="does not read back as written"):
                write(damaged, NEW)
            assert [*(damaged / "set").iterdir()] == []
            return
        write(damaged, NEW)
    assert read_shard(damaged) == "unfinished"
