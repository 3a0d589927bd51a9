"""Shards of others, read in place: the samples are those that WebDataset reads, anything doubtful is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from base.config import UserError
from data.shards import Sample, ShardDataset, ShardWriter, verify
from data.sources import tar_indexing
from data.sources.tar_indexing import index_shards


def parts_of(number: int) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    return {
        "json": json.dumps({"caption": f"c {number}"}).encode(),
        "jpg": rng.bytes(300 + 211 * number),
        "txt": f"c {number}".encode(),
    }


def stock_shards(folder: Path, count: int = 10) -> None:
    """As webdataset's own writer leaves them: with the time as a float, hence PAX headers."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"{number:06d}", **parts_of(number)})


def write_tar(path: Path, names: list[str], format: int = tarfile.USTAR_FORMAT, pax: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(name), pax or {}
            tar.addfile(info, io.BytesIO(name.encode()))


def stock_reading(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield sample["__key__"], {part: value for part, value in sample.items() if not part.startswith("__")}


def our_reading(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    dataset = ShardDataset.open(folder)
    order = np.random.default_rng(0).permutation(len(dataset))
    samples: dict[int, Sample] = dict(zip(order.tolist(), dataset.read(order), strict=True))
    return [
        (samples[index].key, {part: bytes(value) for part, value in samples[index].parts.items()})
        for index in range(len(dataset))
    ]


def test_stock_shards_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    stock_shards(tmp_path / "set")
    tars = {path: path.read_bytes() for path in (tmp_path / "set").glob("*.tar")}
    assert any(raw[156:157] == b"x" for raw in tars.values())  # a PAX header: several blocks before a payload
    manifest = index_shards(tmp_path / "set")
    assert (len(manifest.shards), manifest.num_samples, manifest.num_rejected) == (3, 10, 0)
    assert manifest.source == "index of existing shards in set"
    assert our_reading(tmp_path / "set") == list(stock_reading(tmp_path / "set"))
    assert verify(tmp_path / "set") == []
    assert {path: path.read_bytes() for path in tars} == tars


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_every_tar_format_are_read(tmp_path: Path, format: int) -> None:
    names = [f"{'k' * 60}{number}.{part}" for number in range(4) for part in ("jpg", "cls", "seg.png")]
    pax = {"comment": "x" * 700} if format == tarfile.PAX_FORMAT else {}
    write_tar(tmp_path / "a.b.tar", names, format, pax)
    write_tar(tmp_path / "b.tar", ["other.jpg"], format)
    assert index_shards(tmp_path).num_samples == 5
    assert our_reading(tmp_path) == list(stock_reading(tmp_path))


def test_damage_after_indexing_is_found(tmp_path: Path) -> None:
    stock_shards(tmp_path)
    index_shards(tmp_path)
    path = tmp_path / "part-0001.tar"
    raw = bytearray(path.read_bytes())
    raw[3 * 512 + 5] ^= 1  # in the first payload
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"part-0001\.tar: sample '000004' .*damaged"):
        ShardDataset.open(tmp_path).read([4])


def test_a_second_run_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_shards(tmp_path)
    first = index_shards(tmp_path)
    read: list[str] = []
    original = tar_indexing._index
    monkeypatch.setattr(
        tar_indexing, "_index", lambda path, source: read.append(path.name) or original(path, source)
    )
    assert index_shards(tmp_path) == first
    assert read == []
    write_tar(tmp_path / "more.tar", ["new.jpg"])
    assert index_shards(tmp_path).num_samples == 11
    write_tar(tmp_path / "more.tar", [f"new-{number}.jpg" for number in range(30)])
    assert index_shards(tmp_path).num_samples == 40
    (tmp_path / "part-0002.index.npy").unlink()
    assert index_shards(tmp_path).num_samples == 40
    assert read == ["more.tar", "more.tar", "part-0002.tar"]


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    stock_shards(tmp_path)
    path = tmp_path / "part-0001.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[3].offset])  # between two samples
    with pytest.raises(UserError, match=r"part-0001\.tar: cut short"):
        index_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("names", "pax", "message"),
    [
        (["a b.jpg"], {}, "key 'a b'"),
        (["folder/a.jpg"], {}, "key 'folder/a'"),
        (["k" * 65 + ".jpg"], {}, "is not 1 to 64"),
        (["k" * 120 + ".jpg"], {}, "is not 1 to 64"),
        (["../a.jpg"], {}, "key '../a'"),
        (["a.JPG"], {}, "small letters"),
        (["a." + "p" * 33], {}, "small letters"),
        (["other.jpg"], {"path": "a.jpg"}, "plain header"),
        ([f"a.p{number}" for number in range(9)], {}, "has 9 parts, more than 8"),
        (["a.jpg", "README"], {}, "no file name KEY.part"),
        (["a.jpg", "a.JPG"], {}, "more than once"),
        (["a.jpg"], {"comment": "x" * 200_000}, "something lies before"),
    ],
)
def test_what_the_reader_could_not_address_is_to_be_copied(
    tmp_path: Path, names: list[str], pax: dict[str, Any], message: str
) -> None:
    write_tar(tmp_path / "t.tar", names, tarfile.PAX_FORMAT, pax)
    with pytest.raises(UserError, match=rf"t\.tar: .*{message}.*make_shards\.py webdataset"):
        index_shards(tmp_path)


def test_an_empty_part_is_to_be_copied(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"'a\.txt' has 0 bytes.*make_shards\.py webdataset"):
        index_shards(tmp_path)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["k.jpg"])
    write_tar(tmp_path / "b.tar", ["k.jpg"])
    with pytest.raises(UserError, match="1 keys used twice"):
        index_shards(tmp_path)


def test_our_own_shards_are_left_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples_per_shard=4, source="mine") as writer:
        writer.write(Sample("k", {"jpg": b"x"}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="was made from 'mine'"):
        index_shards(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.tar there"):
        index_shards(tmp_path)
