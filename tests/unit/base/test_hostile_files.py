"""Something else in the place of every file that a command reads: an end within seconds, and a line that names it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import tarfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from base import config, hub, limits
from base.config import UserError
from data.config import StorageConfig
from data.samples.images import read_rgb_file
from data.samples.text import load_text_tokenizer
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from data.shards.index import MANIFEST_NAME
from data.shards.quarantine import read_quarantine
from data.sources import folder_walk
from data.sources.base import BadItemError
from data.sources.caption_files import batches
from data.sources.image_folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.parquet_reading import open_table, row_batches
from data.sources.tar_indexing import index_shards
from data.sources.webdataset import WebDatasetSource
from engine import checkpoint_folder, checkpoint_writer
from engine.checkpoint_reader import Saved
from evaluation.benchmark_files import git_blob_hash
from evaluation.image_source import NpzImages
from evaluation.judges import endpoint
from evaluation.metrics.dpg import read_graphs
from evaluation.metrics.frechet import FeatureStatistics
from evaluation.prompt_sets import write_gedit
from evaluation.reference import Reference
from generator.class_conditional.model import DitConfig, create_generator, load_generator
from generator.pipeline import read_pixels
from generator.prompts import read_prompts
from report.run_contents import read_evaluation, read_lines
from tokenizer.autoencoders import load_autoencoder
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.weights import read_tensors

MAX_S = 5.0
LATENTS = LatentInfo("fp32", (4, 3, 3), (0.5,) * 4, (2.0,) * 4, "autoencoder", "text")


@dataclass(frozen=True)
class Reader:
    """`read(path)` reads a file of this name; `make` writes what stands beside it, and mostly the file too."""

    name: str
    read: Callable[[Path], object]
    make: Callable[[Path], object] = lambda path: path.write_bytes(b"")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def items(source: Any) -> None:
    """Every item of a source; a rejected one is told as the line that it is."""
    numbers = range(len(source)) if hasattr(source, "sample") else range(len(source.units))
    for number in numbers:
        for item in [source.sample(number)] if hasattr(source, "sample") else source.items(number):
            if isinstance(item, BadItemError):
                raise item


def shards(folder: Path) -> None:
    with ShardWriter(folder, max_samples_per_shard=4, source="test") as writer:
        for number in range(4):
            writer.write(Sample(f"s{number}", {"png": png(), "json": b'{"caption": "x"}'}))


def of_folder(path: Path) -> None:
    for name in ("a.png", "a.txt"):
        if name != path.name:
            (path.parent / name).write_bytes(png() if name == "a.png" else b"a box")


def export(path: Path, of_generator: bool = False) -> None:
    if of_generator:
        create_generator(DitConfig(5, 16, 1, 2), LATENTS, 0).save(path.parent)
    else:
        KlAutoencoder(KlConfig(32, 4, (32,), 1)).save(path.parent)


COLUMNS = ParquetColumns(image="image", captions=("text",))
READERS = [
    Reader("a.png", read_rgb_file),
    Reader("edit.png", lambda path: read_pixels(path, 8)),
    Reader("a.txt", lambda path: items(FolderSource(path.parent)), of_folder),
    Reader("a.json", lambda path: items(FolderSource(path.parent)), of_folder),
    Reader("list.jsonl", lambda path: FolderSource(path.parent, path), of_folder),
    Reader("t.jsonl", lambda path: list(batches(path, ["text"]))),
    Reader("t.jsonl.gz", lambda path: list(batches(path, ["text"]))),
    Reader("t.parquet", lambda path: list(batches(path, ["text"]))),
    Reader("i.parquet", lambda path: items(ParquetSource([str(path)], COLUMNS, 10))),
    Reader("gedit.parquet", lambda path: write_gedit([path], path.parent / "out")),
    Reader("w.tar", lambda path: items(WebDatasetSource([path]))),
    Reader("x.tar", lambda path: index_shards(path.parent)),
    Reader("n01440764.tar", lambda path: ImageNetSource(path.parent, num_classes=1)),
    Reader("prompts.txt", read_prompts),
    Reader("graphs.csv", read_graphs),
    Reader(MANIFEST_NAME, lambda path: ShardDataset.open(path.parent), lambda path: shards(path.parent)),
    Reader("shard-000000.index.npy", lambda path: ShardDataset.open(path.parent), lambda path: shards(path.parent)),
    Reader("shard-000000.tar", lambda path: ShardDataset.open(path.parent), lambda path: shards(path.parent)),
    Reader("quarantine.jsonl", read_quarantine),
    Reader("run.yaml", lambda path: config.load(KlConfig, path)),
    Reader("config.json", lambda path: load_autoencoder(path.parent), export),
    Reader("config.json", lambda path: load_generator(path.parent), lambda path: export(path, of_generator=True)),
    Reader("model.safetensors", lambda path: load_autoencoder(path.parent), export),
    Reader("weights.safetensors", read_tensors),
    Reader("weights.pt", read_checkpoint),
    Reader("text_tokenizer.model", lambda path: load_text_tokenizer(str(path.parent))),
    Reader("reference.npz", Reference.open),
    Reader("images.npz", NpzImages.open),
    Reader("statistics.npz", FeatureStatistics.load),
    Reader("scores.json", lambda path: read_evaluation(path)),
    Reader("metrics.jsonl", read_lines),
    Reader("bench.json", git_blob_hash),
]  # fmt: skip


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_huge_file_without_bytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what waits in the main thread."""

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("other", [a_pipe, an_endless_device, a_huge_file_without_bytes])
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_another_thing_in_the_place_of_a_file_is_named(
    reader: Reader, other: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "set" / reader.name
    path.parent.mkdir()
    reader.make(path)
    path.unlink(missing_ok=True)
    other(path)
    with within(MAX_S), pytest.raises((UserError, OSError, BadItemError)) as error:
        reader.read(path)
    said = " ".join(str(value) for value in (error.value, getattr(error.value, "reason", "")))
    assert path.name in said or path.stem in said, said
    assert "\n" not in said


def test_a_device_among_a_checkpoints_files_is_named(tmp_path: Path) -> None:
    for name in (checkpoint_folder.STATE, checkpoint_folder.file_name(0)):
        an_endless_device(tmp_path / name)
    with within(MAX_S):
        state, wrong = checkpoint_folder.read_state(tmp_path)
        assert state == {} and "cannot be read" in wrong
        found = checkpoint_writer.checked(
            tmp_path / checkpoint_folder.file_name(0), checkpoint_writer.Sum(1, 1)
        )
        assert "a pipe or device" in found
        with (
            pytest.raises(UserError, match="a pipe or device"),
            Saved(tmp_path, [checkpoint_folder.file_name(0)], 0),
        ):
            pass


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_folder_of_transformers_is_named(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with within(MAX_S), pytest.raises(OSError, match="a pipe or device"):
        hub.from_pretrained(None, str(tmp_path))


def test_links_that_double_are_counted(tmp_path: Path) -> None:
    """24 folders, each with two links to the next: 16 million ways to the last one."""
    for number in range(24):
        (tmp_path / f"f{number}").mkdir()
    for number in range(23):
        for side in "ab":
            (tmp_path / f"f{number}" / side).symlink_to(tmp_path / f"f{number + 1}")
    with (
        within(MAX_S),
        pytest.raises(UserError, match=r"/f\d+/.*/[ab]: links lead .* more than 16 ways"),
    ):
        folder_walk.below(tmp_path / "f0")


def test_two_links_to_one_folder_are_two_classes(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.png").write_bytes(png())
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / name).symlink_to(tmp_path / "there")
    assert folder_walk.images_below(tmp_path / "set").names == ("a/a.png", "b/a.png")


def test_weights_that_hold_themselves_end(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["model"] = tree
    torch.save(tree, tmp_path / "a.pt")
    with within(MAX_S), pytest.raises(UserError, match=r"a\.pt.*more than tensors \(model\)"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_member_that_takes_no_room_is_rejected_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    members = [("a.png", 40 << 30), ("a.txt", 5), ("b.png", 8), ("b.txt", 40 << 30)]
    with path.open("wb") as file:
        for name, num_bytes in members:
            member = tarfile.TarInfo(name)
            member.size = num_bytes
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            if num_bytes < tarfile.BLOCKSIZE:
                file.write(b"a box".ljust(tarfile.BLOCKSIZE, b"\0"))
            else:
                file.seek(num_bytes, os.SEEK_CUR)
        file.truncate(file.tell() + 2 * tarfile.BLOCKSIZE)
    with within(MAX_S):
        found = list(WebDatasetSource([path]).items(0))
    assert [type(item) for item in found] == [BadItemError, BadItemError]
    assert "'a.png' has 42,949,672,960 bytes, over the limit of 544 MiB" in found[0].reason
    assert "'b.txt' has 42,949,672,960 bytes, over the limit of 1 MiB" in found[1].reason


@pytest.mark.parametrize("name", ["line", "lines"])
def test_a_small_archive_of_captions_that_unfolds_without_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNFOLD_FREE_BYTES", 18 << 20)
    monkeypatch.setattr(limits, "UNFOLD_RATIO", 2)
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(20):
            file.write(
                (b" " if name == "line" else b" " * 65_535 + b"\n") * (1 << 20 if name == "line" else 16)
            )
    limit = "line 1 has more, over the limit of 16 MiB" if name == "line" else "unfolds to more"
    with within(MAX_S), pytest.raises(UserError, match=rf"t\.jsonl\.gz: .*{limit}"):
        list(batches(path, ["text"]))


def bomb(path: Path, **columns: pa.Array) -> None:
    pq.write_table(
        pa.table(columns), path, compression="zstd", compression_level=19, store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["repeated", "list", "page"])
def test_a_table_of_some_kilobytes_that_unfolds_to_gigabytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    big, many = "a" * (4 << 20), pa.array([0] * 1000, pa.int32())
    texts = pa.DictionaryArray.from_arrays(many, pa.array([big]))
    if kind == "repeated":
        bomb(path, text=texts)
    elif kind == "list":
        bomb(path, text=pa.ListArray.from_arrays([0, 1000], texts))
    else:
        monkeypatch.setattr(limits, "UNFOLD_FREE_BYTES", 4 << 20)
        bomb(path, text=pa.array(["a" * (8 << 20)]))
    assert path.stat().st_size < 20_000
    with within(MAX_S), pytest.raises(UserError, match=r"a\.parquet: .*unfolds? to .*over the limit of"):
        list(batches(path, ["text"]))


def test_repeated_images_of_a_table_are_unfolded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 MiB each, where 64 MiB may be unfolded at once."""
    monkeypatch.setattr(limits, "BATCH_BYTES", 64 << 20)
    payload = png() + b"\0" * (8 << 20)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 20, pa.int32()), pa.array([payload]))
    bomb(tmp_path / "a.parquet", image=images, text=pa.array(["a box"] * 20))
    table = open_table(str(tmp_path / "a.parquet"))
    assert [len(rows) for rows in row_batches(table, 0, ["image", "text"], 16)] == [7, 7, 6]
    assert [len(rows) for rows in row_batches(table, 0, ["text"], 16)] == [16, 4]
    items(ParquetSource([str(tmp_path / "a.parquet")], COLUMNS, 100))


def test_an_export_cannot_ask_for_more_than_its_weights_fill(tmp_path: Path) -> None:
    """Each field within its own limit: 1,024 blocks of width 131,072 would take 200 TB."""
    create_generator(DitConfig(5, 16, 1, 2), LATENTS, 0).save(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    for change, limit in (
        ({"num_layers": 1_000_000_000}, "no model with more than 1,024"),
        (
            {"width": 1 << 17, "num_layers": 1000, "num_heads": 128},
            "more values than the weights hold, over the limit",
        ),
    ):
        tree["generator"] |= change
        (tmp_path / "config.json").write_text(json.dumps(tree))
        with within(MAX_S), pytest.raises(UserError, match=limit):
            load_generator(tmp_path)


def test_an_autoencoder_cannot_either(tmp_path: Path) -> None:
    KlAutoencoder(KlConfig(32, 4, (32,), 1)).save(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["kl"] |= {"block_channels": [1 << 17], "blocks_per_level": 1000}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with within(MAX_S), pytest.raises(UserError, match="more values than the weights hold, over the limit"):
        load_autoencoder(tmp_path)


def test_an_index_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    """A mapping of it would have ended the process (SIGBUS); what was read before the cut stays right."""
    with ShardWriter(tmp_path, max_samples_per_shard=1000, source="test") as writer:
        for number in range(1000):
            writer.write(Sample(f"s{number}", {"json": b"{}"}), num_text_tokens=number)
    dataset = ShardDataset.open(tmp_path)
    assert [sample.key for sample in dataset.read([0, 100, 499])] == ["s0", "s100", "s499"]
    os.truncate(tmp_path / "shard-000000.index.npy", 4096)
    assert [sample.key for sample in dataset.read([3, 498])] == ["s3", "s498"]
    for read in (
        lambda: dataset.read([3, 999]),
        lambda: dataset.read([600]),
        lambda: dataset.num_text_tokens,
    ):
        with pytest.raises(UserError, match=r"shard-000000\.index\.npy: .*run the writer again"):
            read()


class Endless(BaseHTTPRequestHandler):
    """A body without an end, or one byte of a header now and then."""

    slow = False

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            if self.slow:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.wfile.write(b"A: b\r\n")
                    time.sleep(0.05)
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b" " * (1 << 16))

    do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Endless,), {})) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_manifest_without_an_end_is_left_at_its_limit(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DOCUMENT_BYTES", 4 << 20)
    url = f"http://127.0.0.1:{server.server_port}/set"
    with within(MAX_S), pytest.raises(UserError, match=rf"{MANIFEST_NAME}: .*over the limit of 4 MiB"):
        ShardDataset.open(url, StorageConfig(cache_dir=str(tmp_path), attempts=1))


@pytest.mark.parametrize("slow", [False, True], ids=["body", "headers"])
def test_a_judge_that_never_ends_its_answer(
    slow: bool, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.RequestHandlerClass.slow = slow  # type: ignore[attr-defined]
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(endpoint, "TRIES", 2)
    judge = endpoint.EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1", "m", sleep=lambda _: None)
    with within(MAX_S), pytest.raises(UserError, match=r"127\.0\.0\.1.*no answer"):
        judge([], "what is this?", 0)
