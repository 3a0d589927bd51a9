"""Whatever happens to a data set on a disk is found and named; training refuses it, or is not touched by it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from base.config import UserError
from data.doctor.examine_set import diagnose
from data.processes import over_shards
from data.samples.captions import read_captions
from data.shards import (
    Manifest,
    Sample,
    ShardDataset,
    ShardWriter,
    shard_name,
    verify,
    write_manifest,
    write_shard,
)
from data.shards.verification import leftovers

SOURCE = "test"
PER_SHARD = 4
NUM_SAMPLES = 12


def make_sample(number: int) -> Sample:
    """Both parts take one block of the tar, so all shards have the same size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * number, 0, 99)).save(buffer, "PNG")
    return Sample(
        f"item{number:02d}",
        {"png": buffer.getvalue(), "json": json.dumps({"caption": f"number {number}"}).encode()},
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", max_samples_per_shard=PER_SHARD, source=SOURCE) as writer:
        for number in range(NUM_SAMPLES):
            writer.write(make_sample(number))
        writer.reject("item99", "too dark: all black")
    return tmp_path / "set"


def member(shards: Path, number: int) -> tarfile.TarInfo:
    """Of shard 1; even ones are json, odd ones png, two a sample."""
    with tarfile.open(shards / shard_name(1)) as tar:
        return tar.getmembers()[number]


def overwrite(path: Path, offset: int, payload: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(payload)


def cut_at_member(shards: Path) -> None:
    os.truncate(shards / shard_name(1), member(shards, 4).offset)


def cut_in_payload(shards: Path) -> None:
    os.truncate(shards / shard_name(1), member(shards, 5).offset_data + 20)


def add_bytes(shards: Path) -> None:
    with (shards / shard_name(1)).open("ab") as file:
        file.write(bytes(512))


def break_checksum(shards: Path) -> None:
    overwrite(shards / shard_name(1), member(shards, 3).offset + 148, b"0000000")


def zero_header(shards: Path) -> None:
    overwrite(shards / shard_name(1), member(shards, 3).offset, bytes(512))


def zero_sample(shards: Path) -> None:
    for offset in [member(shards, number).offset for number in (2, 3)]:
        overwrite(shards / shard_name(1), offset, bytes(512))


def zero_payload(shards: Path) -> None:
    png = member(shards, 3)
    overwrite(shards / shard_name(1), png.offset_data, bytes(png.size))


def flip_a_bit(shards: Path) -> None:
    png = member(shards, 3)
    content = (shards / shard_name(1)).read_bytes()
    overwrite(shards / shard_name(1), png.offset_data + 40, bytes([content[png.offset_data + 40] ^ 1]))


def change_padding(shards: Path) -> None:
    png = member(shards, 3)
    overwrite(shards / shard_name(1), png.offset_data + png.size, b"x")


def swap(shards: Path) -> None:
    (shards / shard_name(0)).rename(shards / "spare")
    (shards / shard_name(1)).rename(shards / shard_name(0))
    (shards / "spare").rename(shards / shard_name(1))


def write_others(shards: Path) -> None:
    """A shard of the same size with other samples, made by another run."""
    samples = [make_sample(number) for number in (8, 9, 10, 11)]
    write_shard(shards / "other" / shard_name(1), samples[::-1], [(0, 0)] * PER_SHARD, source=SOURCE)
    shutil.copy(shards / "other" / shard_name(1), shards / shard_name(1))
    shutil.rmtree(shards / "other")


def remove_shard(shards: Path) -> None:
    (shards / shard_name(1)).unlink()


def remove_index(shards: Path) -> None:
    (shards / "shard-000001.index.npy").unlink()


def take_index_of_another(shards: Path) -> None:
    shutil.copy(shards / "shard-000000.index.npy", shards / "shard-000001.index.npy")


def break_json(shards: Path) -> None:
    """As a writer with a bug would."""
    for number in range(3):
        samples = [make_sample(PER_SHARD * number + i) for i in range(PER_SHARD)]
        if number == 1:
            samples[1] = Sample("item05", {**samples[1].parts, "json": b'{"caption": "a'})
        rejected = (("item99", "dark: black"),) if number == 2 else ()
        write_shard(
            shards / shard_name(number), samples, [(0, 0)] * PER_SHARD, source=SOURCE, rejected=rejected
        )
    write_manifest(shards, [shard_name(number) for number in range(3)], source=SOURCE)


def lose_rejections(shards: Path) -> None:
    (shards / "rejected.jsonl").write_text("")


def edit_manifest(shards: Path) -> None:
    tree = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**tree, "source": "elsewhere"}))


def raise_format(shards: Path) -> None:
    tree = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**tree, "format_version": 99}))


@dataclass(frozen=True)
class Case:
    """Damage, the line that names it, and with which line training refuses it (None: it is not touched)."""

    damage: Callable[[Path], None]
    found: str
    refused: str | None


CASES = [
    Case(cut_at_member, "1.tar: shard has 4096 bytes, manifest.json says 10240", "1.tar: shard has 4096 bytes"),
    Case(cut_in_payload, "1.tar: shard has 5652 bytes, manifest", "1.tar: shard has 5652 bytes"),
    Case(add_bytes, "1.tar: shard has 10752 bytes, manifest", "1.tar: shard has 10752 bytes"),
    Case(break_checksum, "1.tar: sample 'item05' .* header of part 1 is bad .bad checksum", None),
    Case(zero_header, "1.tar: sample 'item05' .* header .* is bad .zeroed", "1.tar: sample 'item05' at byte 2048"),
    Case(zero_sample, "1.tar: sample 1 .its name is lost. at byte 2048", "1.tar: sample '' at byte 2048"),
    Case(zero_payload, "1.tar: sample 'item05' .* payload of 'item05.png' is zeroed", "1.tar: sample 'item05'"),
    Case(flip_a_bit, "1.tar: sample 'item05' .*: its bytes changed", "1.tar: sample 'item05'"),
    Case(change_padding, "1.tar: SHA-256 differs from manifest.json, all samples are sound", None),
    Case(swap, "0.tar: holds the bytes of shard-000001.tar", "0.tar: sample 'item04' at byte 0"),
    Case(write_others, "1.tar: sample 1 .*: sample 'item10' stands in its place", "1.tar: sample 'item11' at byte 0"),
    Case(remove_shard, "1.tar: shard is missing", "1.tar: shard is missing"),
    Case(remove_index, "1.index.npy: index is missing", "1.index.npy: index is missing"),
    Case(take_index_of_another, "1.index.npy: is not the index of shard-000001", "1.index.npy: is not the index"),
    Case(break_json, "1.tar: sample 'item05': part 'json' is not JSON", "1.tar: sample 'item05': no json"),
    Case(lose_rejections, "rejected.jsonl: has 0 lines, manifest.json says 1", None),
    Case(edit_manifest, "manifest.json: was changed after it was written", "was changed after it was written"),
    Case(raise_format, "manifest.json: format version 99", "format version 99"),
]  # fmt: skip


def read_as_training(shards: Path) -> list[Sample]:
    """Everything, captions as well, as a packer asks for them."""
    dataset = ShardDataset.open(shards)
    samples = dataset.read(range(len(dataset)))
    for sample in samples:
        read_captions(sample)
    return samples


@pytest.mark.parametrize("case", CASES, ids=[case.damage.__name__ for case in CASES])
def test_damage_is_named_and_refused_or_harmless(shards: Path, case: Case) -> None:
    case.damage(shards)
    lines = verify(shards)
    assert any(re.search(case.found, line) for line in lines), lines
    assert all(line.startswith(str(shards)) and "\n" not in line for line in lines)
    try:
        doctor_lines = [f"{shards / problem.text}" for problem in diagnose(shards).problems]
    except UserError as error:
        doctor_lines = [str(error)]
    assert doctor_lines == lines
    if case.refused is None:
        assert read_as_training(shards) == [make_sample(number) for number in range(NUM_SAMPLES)]
    else:
        with pytest.raises(UserError, match=case.refused) as error:
            read_as_training(shards)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [break_checksum, zero_header, zero_payload, flip_a_bit])
def test_damage_to_one_sample_is_one_line(shards: Path, damage: Callable[[Path], None]) -> None:
    damage(shards)
    assert len(verify(shards)) == 1


def test_stock_readers_lose_samples_where_ours_does_not(shards: Path) -> None:
    """Why a header whose payload we still read is a problem all the same."""
    break_checksum(shards)
    with tarfile.open(shards / shard_name(1)) as tar:
        assert len(tar.getnames()) < 2 * PER_SHARD


def test_several_processes_find_the_same(shards: Path) -> None:
    zero_payload(shards)
    (shards / shard_name(2)).unlink()
    lines = verify(shards)
    assert len(lines) == 2
    assert verify(shards, num_processes=2) == lines


def test_a_sound_data_set_has_no_problems(shards: Path) -> None:
    assert verify(shards) == []
    assert leftovers(shards, Manifest.read(shards)) == []


def test_no_data_set_is_a_problem(tmp_path: Path) -> None:
    assert len(verify(tmp_path)) == 1


def test_leftovers_are_notes(shards: Path) -> None:
    (shards / ".shard-000003.tar.host-1.tmp").write_bytes(b"half")
    shutil.copy(shards / shard_name(0), shards / shard_name(9))
    assert verify(shards) == []
    temporary, unlisted = leftovers(shards, Manifest.read(shards))
    assert temporary.startswith(".shard-000003.tar.host-1.tmp: temporary file")
    assert unlisted.startswith("shard-000009.tar: not in manifest.json")


def test_a_large_shard_is_read_in_pieces(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.shards.verification.CHUNK_BYTES", 5000)  # two samples and a half
    spans: list[int] = []
    read = ShardDataset.read
    monkeypatch.setattr(
        ShardDataset, "read", lambda self, which: spans.append(len(which)) or read(self, which)
    )
    assert verify(shards) == []
    assert sum(spans) == NUM_SAMPLES and max(spans) <= 3


def test_a_killed_process_ends_the_work_with_one_line() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(over_shards(lambda shard: os._exit(9), [1, 1, 1], 2, "test"))
    with pytest.raises(UserError, match="0 processes"):
        list(over_shards(lambda shard: shard, [1], 0, "test"))
