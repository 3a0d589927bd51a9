"""Near copies of images are dropped: exactly those, each named, and the same bytes after any kill."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from base import files
from base.config import UserError
from data.shards import Sample, ShardDataset, finished_shard, shard_name, verify, write_manifest, write_shard
from data.sources import deduplicate
from data.sources.deduplicate import find_duplicates, remove_duplicates

IDENTITY = "test"
NAMES = [shard_name(number) for number in range(3)]


def slow_duplicates(hashes: np.ndarray, max_bits: int) -> list[int]:
    """By the definition: every pair. `hashes`: uint64 [N, 3], image, source, text."""
    earliest = []
    for late, row in enumerate(hashes.tolist()):
        alike = (
            early
            for early, other in enumerate(hashes[:late].tolist())
            if (row[0] ^ other[0]).bit_count() + (row[1] ^ other[1]).bit_count() <= max_bits
            and row[2] == other[2]
        )
        earliest.append(next(alike, late))
    return earliest


@pytest.mark.parametrize("max_bits", range(4))
@pytest.mark.parametrize("kind", ["images", "edits", "one band", "all near"])
def test_exactly_the_pairs_within_max_bits_are_found(
    kind: str, max_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains included: b near a, c near b but not near a, c is still dropped."""
    monkeypatch.setattr(deduplicate, "PAIRS_AT_ONCE", 1000)  # several steps in a full band
    random = np.random.default_rng(max_bits)
    hashes = random.integers(0, 1 << 64, (600, 3), dtype=np.uint64)
    hashes[:, 1:] = 0
    if kind == "one band":
        hashes[:, 0] &= np.uint64(0xFFFF << 32)
    if kind == "edits":
        hashes[:, 1] = random.integers(0, 1 << 64, 600, dtype=np.uint64)
        hashes[:, 2] = random.integers(0, 2, 600, dtype=np.uint64)
    for _ in range(900):  # copies of copies, each changed in up to 4 bits in all
        early, late = np.sort(random.integers(0, 600, 2))
        hashes[late] = hashes[early]
        for bit in random.integers(0, 64, random.integers(0, 5)):
            column = random.integers(0, 2) if kind == "edits" else 0
            hashes[late, column] ^= np.uint64(1) << np.uint64(bit)
    if kind == "all near":
        hashes[:, 0] &= np.uint64(0x1F)
    found = find_duplicates(*hashes.T.copy(), max_bits=max_bits).tolist()
    assert found == slow_duplicates(hashes, max_bits)
    assert 50 < sum(early < late for late, early in enumerate(found)) < 600


def test_nothing_has_no_duplicates() -> None:
    nothing = np.zeros(0, np.uint64)
    assert find_duplicates(nothing, nothing, nothing, max_bits=3).tolist() == []


def picture(seed: int, kind: str = "png", size: int = 64) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).resize((size, size)).save(buffer, kind)
    return buffer.getvalue()


# Pictures by shard: a number is a picture, a letter a changed copy of it.
SHARDS = [["0", "1", "0jpg"], ["2", "1small", "3"], ["0small", "2jpg"]]
KEPT = {"s0-0": "0", "s0-1": "1", "s1-0": "2", "s1-2": "3"}
DROPPED = {"s0-2": "s0-0", "s1-1": "s0-1", "s2-0": "s0-0", "s2-1": "s1-0"}


def image(name: str) -> dict[str, bytes]:
    seed = int(name[0])
    if name.endswith("jpg"):
        return {"jpg": picture(seed, "jpeg")}
    return {"png": picture(seed, size=48 if name.endswith("small") else 64)}


def write_one(directory: Path, number: int) -> None:
    samples = [
        Sample(f"s{number}-{place}", {**image(name), "json": json.dumps({"caption": name}).encode()})
        for place, name in enumerate(SHARDS[number])
    ]
    counts = [(7, place) for place in range(len(samples))]
    write_shard(
        directory / shard_name(number),
        samples,
        counts,
        source=IDENTITY,
        rejected=((f"bad{number}", "no caption: x"),),
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(len(SHARDS)):
        write_one(tmp_path / "set", number)
    return tmp_path / "set"


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_copies_in_other_sizes_and_formats_are_dropped_and_named(shards: Path, num_processes: int) -> None:
    assert remove_duplicates(shards, NAMES, IDENTITY, 3, num_processes) == len(DROPPED)
    manifest = write_manifest(shards, NAMES, source=IDENTITY)
    assert verify(shards) == []
    dataset = ShardDataset.open(shards)
    captions = {
        sample.key: json.loads(sample.parts["json"])["caption"]
        for sample in dataset.read(range(len(dataset)))
    }
    assert captions == KEPT
    assert [entry.name for entry in manifest.shards] == NAMES[:2], "nothing is left of the third"
    assert dataset.num_text_tokens.tolist() == [0, 1, 0, 2] and set(dataset.num_image_tokens.tolist()) == {7}
    lines = [json.loads(line) for line in (shards / "rejected.jsonl").read_text().splitlines()]
    duplicates = {line["key"]: line["reason"] for line in lines if line["reason"].startswith("duplicate")}
    assert duplicates == {key: f"duplicate: of {original}" for key, original in DROPPED.items()}
    assert manifest.num_rejected == len(DROPPED) + len(SHARDS)
    for number, name in enumerate(NAMES):
        progress = finished_shard(shards / name, source=IDENTITY)
        assert progress is not None and progress.num_read == len(SHARDS[number]) + 1


def test_running_again_changes_nothing(shards: Path) -> None:
    remove_duplicates(shards, NAMES, IDENTITY, 3, 1)
    before = tree(shards)
    assert remove_duplicates(shards, NAMES, IDENTITY, 3, 1) == len(DROPPED)
    assert tree(shards) == before


@pytest.mark.parametrize(
    "stop_at, nth", [("hash", 2), ("rewrite", 2), ("publish", 1), ("publish", 2), ("side file", 2)]
)
def test_killed_and_run_again_gives_the_same_bytes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str, nth: int
) -> None:
    shutil.copytree(shards, tmp_path / "whole")
    remove_duplicates(tmp_path / "whole", NAMES, IDENTITY, 3, 1)
    calls = 0

    def stopping(function):  # type: ignore[no-untyped-def]
        def stop(*arguments):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == nth:
                raise KeyboardInterrupt
            return function(*arguments)

        return stop

    with monkeypatch.context() as patch:
        if stop_at == "hash":
            patch.setattr(deduplicate, "_hashes", stopping(deduplicate._hashes))
        elif stop_at == "rewrite":
            patch.setattr(deduplicate, "_rewrite", stopping(deduplicate._rewrite))
        elif stop_at == "publish":
            patch.setattr(deduplicate.OpenShard, "close", stopping(deduplicate.OpenShard.close))
        else:
            patch.setattr(files, "write_json", stopping(files.write_json))
        with pytest.raises(KeyboardInterrupt):
            remove_duplicates(shards, NAMES, IDENTITY, 3, 1)
    for number, name in enumerate(NAMES):  # as the writer does when the same command runs again
        if finished_shard(shards / name, source=IDENTITY) is None:
            write_one(shards, number)
    assert remove_duplicates(shards, NAMES, IDENTITY, 3, 1) == len(DROPPED)
    assert tree(shards) == tree(tmp_path / "whole")


def test_duplicate_with_the_key_of_a_rejected_item_is_dropped(tmp_path: Path) -> None:
    samples = [Sample(key, {"png": picture(0)}) for key in ("a", "b")]
    rejected = (("b", "no caption: x"),)
    write_shard(tmp_path / NAMES[0], samples, [(0, 0)] * 2, source=IDENTITY, rejected=rejected)
    for _ in range(2):
        assert remove_duplicates(tmp_path, NAMES[:1], IDENTITY, 0, 1) == 1
        progress = finished_shard(tmp_path / NAMES[0], source=IDENTITY)
        assert progress is not None and progress.entry is not None and progress.entry.num_samples == 1
        assert progress.rejected == (*rejected, ("b", "duplicate: of a"))


def test_bad_json_of_an_edit_is_named(tmp_path: Path) -> None:
    sample = Sample("a", {**edit_sample("a", 0, 1, "x").parts, "json": b"[]"})
    write_shard(tmp_path / NAMES[0], [sample], [(0, 0)], source=IDENTITY)
    with pytest.raises(UserError, match="sample 'a': bad json"):
        remove_duplicates(tmp_path, NAMES[:1], IDENTITY, 0, 1)


def test_hashes_of_other_images_are_not_believed(tmp_path: Path) -> None:
    """A shard that was written anew from changed images under the same keys."""
    for seed, num_dropped in ((1, 0), (0, 1)):
        samples = [Sample("a", {"png": picture(0)}), Sample("b", {"png": picture(seed)})]
        write_shard(tmp_path / NAMES[0], samples, [(0, 0)] * 2, source=IDENTITY)
        assert remove_duplicates(tmp_path, NAMES[:1], IDENTITY, 0, 1) == num_dropped


def test_lost_hashes_of_dropped_samples_are_said(shards: Path) -> None:
    remove_duplicates(shards, NAMES, IDENTITY, 3, 1)
    (shards / "shard-000001.phash.npy").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"shard-000001\.phash\.npy.*delete .*shard-000001\.json"):
        remove_duplicates(shards, NAMES, IDENTITY, 3, 1)


def edit_sample(key: str, source: int, target: int, instruction: str) -> Sample:
    meta = {"instructions": [instruction], "id": key}
    parts = {"source.png": picture(source), "target.jpg": picture(target, "jpeg")}
    return Sample(key, {**parts, "json": json.dumps(meta).encode()})


def test_edits_are_copies_only_with_equal_source_target_and_instruction(tmp_path: Path) -> None:
    samples = [
        edit_sample("first", 0, 1, "x"),
        edit_sample("other-source", 2, 1, "x"),
        edit_sample("other-target", 0, 2, "x"),
        edit_sample("other-words", 0, 1, "y"),
        edit_sample("copy", 0, 1, "x"),
    ]
    write_shard(tmp_path / NAMES[0], samples, [(0, 0)] * 5, source=IDENTITY)
    assert remove_duplicates(tmp_path, NAMES[:1], IDENTITY, 3, 1) == 1
    progress = finished_shard(tmp_path / NAMES[0], source=IDENTITY)
    assert progress is not None and progress.rejected == (("copy", "duplicate: of first"),)


def test_wrong_use_is_one_line(shards: Path) -> None:
    with pytest.raises(UserError, match="within 4 bits; choose 0 to 3"):
        deduplicate.description(4)
    with pytest.raises(UserError, match="missing or cut short"):
        remove_duplicates(shards, [*NAMES, shard_name(3)], IDENTITY, 3, 1)
    with pytest.raises(UserError, match="was made from 'test'"):
        remove_duplicates(shards, NAMES, "another", 3, 1)
