"""Captions joined to images by key or url: built once, never half, and no image gets another one's caption."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from base.config import UserError
from data.shards import Sample, ShardDataset
from data.sources import caption_table
from data.sources.base import BadItemError
from data.sources.caption_table import CaptionTable, build_caption_table
from data.sources.webdataset import WebDatasetSource
from data.sources.write import Workers, write_sources


def row(number: int, **changes: Any) -> dict[str, Any]:
    """As CaptionEmporium/conceptual-captions-cc12m-llavanext has it."""
    return {
        "url": f"http://example.org/{number}.jpg",
        "key": f"{number:09d}",
        "caption": f"alt {number}",
        "caption_llava": f"The image shows {number}. It shows it. It shows it.",
        "caption_llava_short": f"shows {number}",
        **changes,
    }


ROWS = [row(number) for number in range(40)]


def captions(number: int) -> dict[str, str]:
    return {
        "llava": f"The image shows {number}. It shows it. It shows it.",
        "llava_short": f"shows {number}",
        "alt": f"alt {number}",
    }


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return path
    payload = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


def build(folder: Path, name: str = "train.jsonl", rows: list[dict[str, Any]] = ROWS, **options: Any) -> Path:
    path = folder / "captions.sqlite"
    build_caption_table([write_rows(folder / name, rows)], path, **options)
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train-0.parquet"])
@pytest.mark.parametrize("join", ["key", "url"])
def test_every_row_is_found_in_every_format(tmp_path: Path, name: str, join: Any) -> None:
    table = CaptionTable(build(tmp_path, name), join=join)
    for number in range(40):
        url = f"http://example.org/{number}.jpg"
        assert table.find("item", f"{number:09d}", url) == captions(number)
    with pytest.raises(BadItemError, match=f"no caption: no row with {join}") as caught:
        table.find("item", "000000040", "http://example.org/40.jpg")
    assert caught.value.key == "item"


def test_numbers_are_padded_as_they_like(tmp_path: Path) -> None:
    table = CaptionTable(build(tmp_path, rows=[row(7, key=7), row(0, key="000")]), join="key")
    assert table.find("item", "000000007", "") == captions(7)
    assert table.find("item", "0", "") == captions(0)


def test_a_key_of_another_download_is_not_believed(tmp_path: Path) -> None:
    table = CaptionTable(build(tmp_path), join="key")
    with pytest.raises(BadItemError, match=r"other image: .* another url"):
        table.find("item", "000000003", "http://example.org/4.jpg")


def test_columns_are_chosen_and_named(tmp_path: Path) -> None:
    path = build(tmp_path, columns={"caption_llava_short": "short"})
    assert CaptionTable(path).find("item", "", "http://example.org/1.jpg") == {"short": "shows 1"}


def test_empty_captions_are_dropped_and_all_empty_is_none(tmp_path: Path) -> None:
    empty = {"caption": None, "caption_llava": " ", "caption_llava_short": ""}
    rows = [row(0), row(1, caption_llava="", caption=None), row(2, **empty)]
    table = CaptionTable(build(tmp_path, rows=rows))
    assert table.find("item", "", "http://example.org/1.jpg") == {"llava_short": "shows 1"}
    with pytest.raises(BadItemError, match=r"no caption: .* empty"):
        table.find("item", "", "http://example.org/2.jpg")


def test_the_first_of_several_rows_counts(tmp_path: Path) -> None:
    table = CaptionTable(build(tmp_path, rows=[row(0), row(1, url=row(0)["url"])]))
    assert table.find("item", "", row(0)["url"]) == captions(0)


def test_half_a_surrogate_pair_does_not_stop_the_build(tmp_path: Path) -> None:
    table = CaptionTable(build(tmp_path, rows=[row(0, caption="a \ud83d b")]))
    assert table.find("item", "", row(0)["url"])["alt"] == "a ? b"


@pytest.mark.parametrize("join", ["key", "url"])
def test_half_a_surrogate_pair_in_key_or_url_is_found_as_it_was_stored(tmp_path: Path, join: Any) -> None:
    key, url = "k\ud83d", "http://example.org/\ud83d.jpg"
    table = CaptionTable(build(tmp_path, rows=[row(0, key=key, url=url), row(1)]), join=join)
    assert table.find("item", key, url) == captions(0)
    with pytest.raises(BadItemError, match="no caption: no row"):
        table.find("item", "other \ud83d", "other \ud83d")


def test_two_commands_build_a_table_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on two nodes that share the folder and have equal host names and process ids."""
    original, is_filling, go_on, fills = caption_table._fill, threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> None:
        fills.append(arguments)
        is_filling.set()
        go_on.wait(10)
        original(*arguments)

    monkeypatch.setattr(caption_table, "_fill", slow)
    rows, path = write_rows(tmp_path / "train.jsonl"), tmp_path / "captions.sqlite"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build_caption_table, [rows], path)
        assert is_filling.wait(10)
        second = pool.submit(build_caption_table, [rows], path)
        assert not wait([second], timeout=0.3).done
        go_on.set()
        first.result()
        second.result()
    assert len(fills) == 1
    assert CaptionTable(path).find("item", "", row(1)["url"]) == captions(1)


def test_a_temporary_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".captions.sqlite.{socket.gethostname()}-1.tmp"
    stale.write_bytes(b"half")
    build(tmp_path)
    assert not stale.exists()


def test_the_table_is_built_once_and_again_when_its_inputs_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path)
    first, description = path.stat().st_mtime_ns, CaptionTable(path).description
    hashed: list[Path] = []
    original = caption_table.files.sha256
    monkeypatch.setattr(caption_table.files, "sha256", lambda file: hashed.append(file) or original(file))
    build_caption_table([tmp_path / "train.jsonl"], path)
    assert path.stat().st_mtime_ns == first
    assert not hashed  # size and time are as they were
    build(tmp_path)  # written again with the same content
    assert path.stat().st_mtime_ns == first
    assert hashed
    build(tmp_path, columns={"caption": "alt"})
    assert path.stat().st_mtime_ns != first
    build(tmp_path, rows=[row(1, caption="changed")])
    assert CaptionTable(path).find("item", "", row(1)["url"])["alt"] == "changed"
    assert CaptionTable(path).description != description


def test_a_failed_build_leaves_the_old_table_and_no_other_file(tmp_path: Path) -> None:
    path = build(tmp_path)
    whole = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(whole + b'{"url": ')
    with pytest.raises(UserError, match="line 41"):
        build_caption_table([tmp_path / "train.jsonl"], path)
    names = sorted(found.name for found in tmp_path.iterdir())
    assert names == [".captions.sqlite.lock", "captions.sqlite", "train.jsonl"]
    assert CaptionTable(path).find("item", "", row(1)["url"]) == captions(1)


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.parquet"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / name)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{name}: damaged .* download it again"):
        build_caption_table([file], tmp_path / "captions.sqlite")
    assert not (tmp_path / "captions.sqlite").exists()


def test_wrong_inputs_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing in column caption_llava, "):
        build(tmp_path, rows=[{"url": "u", "key": "1", "caption": "c"}])
    with pytest.raises(UserError, match="nothing in column id, link"):
        build(tmp_path, key_column="id", url_column="link")
    with pytest.raises(UserError, match="column 'caption' holds list"):
        build(tmp_path, rows=[row(1, caption=["c"])])
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        build_caption_table([tmp_path / "gone.jsonl"], tmp_path / "t.sqlite")
    with pytest.raises(UserError, match="no finished caption table"):
        CaptionTable(tmp_path / "t.sqlite")
    (tmp_path / "t.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match="not a caption table"):
        CaptionTable(tmp_path / "t.sqlite")


def cc12m_tars(folder: Path) -> list[Path]:
    """3 tars of 4 samples as pixparse/cc12m-wds and img2dataset give them; sample 11 has no row, 5 no url."""
    tars = []
    for shard in range(3):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(4 * shard, 4 * shard + 4):
                url = None if number == 5 else f"http://example.org/{number}.jpg"
                tree = {"caption": f"alt {number}", "url": url, "key": f"{number:09d}", "status": "success"}
                files = {"jpg": b"image", "txt": b"web text", "json": json.dumps(tree).encode()}
                for part, payload in files.items():
                    info = tarfile.TarInfo(f"{number:09d}.{part}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        tars.append(path)
    return tars


def test_cc12m_gets_its_captions_in_forked_workers(tmp_path: Path) -> None:
    path = build(tmp_path, "train.jsonl.gz", ROWS[:11])
    table = CaptionTable(path)
    table.find("item", "", row(0)["url"])  # the parent's connection must not be used by the workers
    source = WebDatasetSource(cc12m_tars(tmp_path), captions=table)
    ledger = write_sources({tmp_path / "out": source}, Workers(2))[tmp_path / "out"]
    assert (ledger.num_read, ledger.num_written) == (12, 10)
    assert ledger.reasons == (("no caption", 2),)
    dataset = ShardDataset.open(tmp_path / "out")
    for sample in dataset.read(range(10)):
        tree = json.loads(sample.parts["json"])
        assert tree["captions"] == captions(int(tree["key"]))
        assert "caption" not in tree
        assert "web text" not in sample.parts["json"].decode()
    assert "caption_llava as llava" in dataset.manifest.source


def test_a_join_by_key_uses_the_tar_s_key_without_json(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("00000/000000003.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"image"))
    source = WebDatasetSource([tmp_path / "a.tar"], captions=CaptionTable(build(tmp_path), join="key"))
    (item,) = source.items(0)
    assert isinstance(item, Sample)
    assert json.loads(item.parts["json"])["captions"] == captions(3)


def test_a_fork_opens_its_own_connection(tmp_path: Path) -> None:
    """SQLite's connections must not be carried over a fork."""
    table = CaptionTable(build(tmp_path))
    parent = table._connected()

    def child() -> None:
        assert table.find("item", "", row(3)["url"]) == captions(3)
        assert table._connected() is not parent

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert table._connected() is parent
