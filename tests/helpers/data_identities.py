"""Rows of the table of identities: files, the order of samples, shards, mixtures, and the sources of samples."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from base import files
from data.config import SetConfig
from data.plan import plan
from data.plan.cursor import StreamCursor
from data.plan.mixture import Member, Mixture
from data.samples import text
from data.samples.latents import latent_seed
from data.shards import LatentInfo, Sample, ShardDataset, ShardEntry, ShardWriter
from data.shards import index as shard_index
from data.shards.index import Manifest
from data.sources import caption_table, deduplicate, webdataset, write
from data.sources.base import InUnits
from data.sources.draws import Draws, Shuffled
from data.sources.image_folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.omniedit import OmniEditFilter
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.webdataset import WebDatasetSource
from helpers.identities import Identity, fields_identity
from helpers.trees import tar_of


def write_files(folder: Path, content: dict[str, bytes]) -> Path:
    for name, payload in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(payload)
    return folder


def shards(folder: Path, payloads: dict[str, bytes], source: str = "test") -> Path:
    """Pixel shards of two samples each."""
    with ShardWriter(folder, max_samples_per_shard=2, source=source) as writer:
        for key, payload in payloads.items():
            writer.write(Sample(key, {"png": payload}))
    return folder


A = {"a": b"1", "b": b"2", "c": b"3", "d": b"4"}
B = {"e": b"5", "f": b"6"}


def mixture(folder: Path, sets: dict[str, dict[str, bytes]], weights: Any, left_out: Any) -> str:
    """The fingerprint of sets written to `folder`. `left_out`: set -> lines of its quarantine file."""
    configs = {}
    for name, payloads in sets.items():
        shards(folder / name, payloads)
        quarantine = folder / f"{name}.jsonl" if name in left_out else None
        if quarantine is not None:
            lines = [json.dumps({kind: what, "reason": why}) for kind, what, why in left_out[name]]
            quarantine.write_text("\n".join(lines))
        configs[name] = SetConfig(
            str(folder / name), weights[name], quarantine=str(quarantine) if quarantine else None
        )
    return Mixture.open(configs).fingerprint


LEFT_OUT = {"A": [("key", key, "bad") for key in "abc"]}
MIXTURE: dict[str, Any] = {"sets": {"A": A, "B": B}, "weights": {"A": 1.0, "B": 1.0}, "left_out": LEFT_OUT}


def cursor_hash(folder: Path, before: str, keys: list[int]) -> str:
    cursor: Any = SimpleNamespace(_mixture=SimpleNamespace(key_hashes=np.array(keys, np.uint64)))
    return StreamCursor._hash(cursor, before, np.arange(len(keys)))


ENTRY = ShardEntry("shard-000000.tar", 10, 2, "aa", "bb")
LATENT = LatentInfo("fp32", (1, 2, 2), (0.0,), (1.0,), "autoencoder", "text")
MANIFEST = Manifest(2, "test", (ENTRY,), LATENT, 2, 0)


def in_manifest(**changes: Any) -> Any:
    return lambda value: dataclasses.replace(
        MANIFEST, **{name: make(value) for name, make in changes.items()}
    )


def encoded(colour: int, size: int = 16) -> bytes:
    pixels = np.random.default_rng(colour).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def hashed(folder: Path, key: str, source: int, target: int, instructions: str) -> object:
    """What two samples are compared by: hashes of target, source and instructions."""
    meta = json.dumps({"instructions": [instructions]}).encode()
    parts = {"source.png": encoded(source), "target.png": encoded(target), "json": meta}
    return deduplicate._hash_sample(Sample(key, parts))[2:]


def table(
    folder: Path, content: str, name: str, columns: Any, key: str, url: str, layout: int, join: Any
) -> object:
    """What a caption table is compared by, and what it adds to a source's description."""
    row = {"key": "1", "url": "u", "key2": "3", "url2": "v", "caption": content, "other": "x"}
    write_files(folder, {name: json.dumps(row).encode()})
    path = folder / "table.sqlite"
    with mock.patch.object(caption_table, "LAYOUT", layout):
        caption_table.build_caption_table(
            [folder / name], path, columns=columns, key_column=key, url_column=url
        )
    identity = caption_table._identity(path)
    assert identity is not None
    compared = caption_table._without_times(identity)
    return compared, list(compared["columns"]), caption_table.CaptionTable(path, join=join).description


def tars(folder: Path, content: dict[str, bytes], fields: Any) -> object:
    write_files(folder / "tars", content)
    source = WebDatasetSource([folder / "tars" / name for name in content], caption_fields=fields)
    return source.description


def image_folder(
    folder: Path, content: dict[str, bytes], listing: str | None, labels: bool, above: str
) -> str:
    write_files(folder / above / "images", content)
    if listing is not None:
        (folder / "list.jsonl").write_text(listing)
    path = None if listing is None else folder / "list.jsonl"
    return FolderSource(folder / above / "images", path, labels=labels).description


def imagenet(folder: Path, members: dict[str, bytes], labels: str) -> str:
    write_files(folder, {"val.tar": tar_of(members.items()), "labels.txt": labels.encode()})
    return ImageNetSource(folder / "val.tar", folder / "labels.txt", num_classes=2).description


def parquet(folder: Path, rows: int, name: str, captions: Any, image: str, per_shard: int, task: str) -> str:
    column, texts = pa.array([b"x"] * rows), ["c"] * rows
    found = pa.table({"image": column, "image2": column, "caption": texts, "other": texts})
    pq.write_table(found, folder / name, row_group_size=1)
    columns = ParquetColumns(image=image, captions=captions)
    row_filter: Any = SimpleNamespace(columns=(), description=task)
    return ParquetSource([str(folder / name)], columns, per_shard, row_filter=row_filter).description


@dataclasses.dataclass(frozen=True)
class Words:
    """A source of numbered items, as far as its description goes."""

    description: str

    def __len__(self) -> int:
        return 8


class Tokenizer:
    """A tokenizer of transformers, as far as its fingerprint goes."""

    def __init__(self, merges: str, name: str) -> None:
        self.backend_tokenizer, self.name_or_path = SimpleNamespace(to_str=lambda: merges), name

    def __len__(self) -> int:
        return len(text.SPECIAL_TOKENS)

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(text.SPECIAL_TOKENS)}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


def written_as(folder: Path, source: str, recipe: int, prepare: Any, bits: Any) -> str:
    with mock.patch.object(write, "RECIPE", recipe):
        described: Any = Words(source)
        return write._identity(described, prepare and Preparation(**prepare), bits)


SAMPLES = {"num_samples": 300, "fingerprint": "f", "seed": 1, "epoch": 2, "num_streams": 2, "stream": 1}
PREPARED = {
    "resolution": 64,
    "min_px": 32,
    "max_aspect": 2.0,
    "min_words": 1,
    "max_words": 9,
    "min_letters": 2,
}
DATA: tuple[Identity, ...] = (
    Identity(
        "base.files.digest",
        lambda folder, **value: files.digest(value),
        {"a": [1, 2], "b": {"c": 1, "d": None}},
        {"a": [2, 1], "b": {"c": 1, "d": 0}},
        {"the order of a dict": {"b": {"d": None, "c": 1}}},
    ),
    Identity(
        "base.files.sha256",
        lambda folder, name, payload: files.sha256(write_files(folder, {name: payload}) / name),
        {"payload": b"a" * 5_000_000 + b"bc", "name": "x"},
        {"payload": b"a" * 5_000_000 + b"bd"},
        {"the file's name": {"name": "y"}},
    ),
    Identity(
        "data.plan.plan.pack_seed",
        lambda folder, **names: plan.pack_seed(**names),
        {"seed": 0, "step": 1, "stream": 2},
        {"seed": 1, "step": 2, "stream": 1},
        through=["data.plan.plan._digest_words"],
    ),
    Identity(
        "data.plan.plan.sample_uniforms",
        lambda folder, **names: plan.sample_uniforms(**names),
        {"seed": 0, "epoch": 1, "key": "a"},
        {"seed": 1, "epoch": 2, "key": "b"},
    ),
    Identity(
        "data.plan.plan.epoch_order",
        lambda folder, **names: plan.epoch_order(**names).tolist(),
        SAMPLES,
        {"num_samples": 500, "fingerprint": "g", "seed": 2, "epoch": 1, "num_streams": 3, "stream": 0},
    ),
    Identity(
        "data.plan.plan.epoch_order",
        lambda folder, **names: plan.epoch_order(num_streams=1, stream=0, **names).tolist(),
        {
            "num_samples": 60,
            "fingerprint": "f",
            "seed": 1,
            "epoch": 2,
        },  # one block, so its samples' order decides
        {"num_samples": 61, "fingerprint": "g", "seed": 2, "epoch": 1},
    ),
    Identity(
        "data.plan.plan.set_draws",
        lambda folder, draws, **names: plan.set_draws(np.arange(*draws), **names).tolist(),
        {"draws": (0, 99), "weights": [1.0, 2.0], "fingerprint": "f", "seed": 1, "stream": 1},
        {"draws": (1, 100), "weights": [2.0, 1.0], "fingerprint": "g", "seed": 2, "stream": 2},
        {"weights of the same shares": {"weights": [3.0, 6.0]}},
    ),
    Identity(
        "data.plan.mixture.Mixture.fingerprint",
        mixture,
        MIXTURE,
        {
            "sets": {"A": A, "B": {**B, "f": b"7"}},
            "weights": {"A": 1.0, "B": 2.0},
            "left_out": {"A": [("key", key, "bad") for key in "abd"]},
        },
        {
            "names of the sets": {
                "sets": {"C": A, "D": B},
                "weights": {"C": 1.0, "D": 1.0},
                "left_out": {"C": LEFT_OUT["A"]},
            },
            "order and reasons in the quarantine file": {
                "left_out": {"A": [("key", key, "worse") for key in "cab"]}
            },
        },
        through=["data.plan.mixture._open", "data.plan.mixture.Mixture.__init__"],
    ),
    Identity(
        "data.plan.mixture.Mixture.fingerprint",
        lambda folder, payloads, left_out: mixture(folder, {"A": payloads}, {"A": 1.0}, left_out),
        {"payloads": A, "left_out": {}},
        {"payloads": {**A, "e": b"5"}, "left_out": {"A": [("shard", "shard-000001.tar", "lost")]}},
    ),
    Identity(
        "data.plan.mixture.Mixture.fingerprint",
        lambda folder, shard: mixture(
            folder, {"A": A}, {"A": 1.0}, {"A": [("shard", f"shard-00000{shard}.tar", "lost")]}
        ),
        {"shard": 0},
        {"shard": 1},
    ),
    Identity(
        "data.plan.mixture.Mixture.key_hashes",
        lambda folder, keys: Mixture(
            [Member("", ShardDataset.open(shards(folder, keys)))]
        ).key_hashes.tolist(),
        {"keys": A},
        {"keys": {**dict(list(A.items())[:3]), "e": b"4"}},
        {"what is in the samples": {"keys": dict.fromkeys(A, b"0")}},
        through=["data.shards.reader.ShardDataset.key_hashes"],
    ),
    Identity(
        "data.plan.cursor.StreamCursor._hash",
        cursor_hash,
        {"before": "b", "keys": [1, 2]},
        {"before": "c", "keys": [2, 1]},
    ),
    Identity(
        "data.shards.reader.ShardDataset.fingerprint",
        lambda folder, payloads, source: ShardDataset.open(shards(folder, payloads, source)).fingerprint,
        {"payloads": A, "source": "test"},
        {"payloads": dict(reversed(A.items())), "source": "other"},
    ),
    fields_identity(
        "data.shards.index.Manifest.digest",
        MANIFEST,
        Manifest.digest,
        {
            "format_version": 3,
            "source": "other",
            "shards": (ENTRY, ENTRY),
            "latent": None,
            "num_samples": 3,
            "num_rejected": 1,
        },
        {"fingerprint": "anything"},
    ),
    fields_identity(
        "data.shards.index.Manifest.digest",
        ENTRY,
        lambda entry: dataclasses.replace(MANIFEST, shards=(entry,)).digest(),
        {"name": "s.tar", "num_bytes": 11, "num_samples": 3, "sha256": "ab", "index_sha256": "bc"},
    ),
    fields_identity(
        "data.shards.index.Manifest.digest",
        LATENT,
        lambda latent: dataclasses.replace(MANIFEST, latent=latent).digest(),
        {
            "dtype": "bf16",
            "shape": (1, 2, 3),
            "mean": (0.5,),
            "std": (2.0,),
            "tokenizer_fingerprint": "other",
            "text_tokenizer_fingerprint": "other",
            "num_views": 2,
            "has_logvar": True,
        },
    ),
    Identity(
        "data.shards.index.key_hash",
        lambda folder, key: shard_index.key_hash(key),
        {"key": "a"},
        {"key": "A"},
    ),
    Identity(
        "data.shards.index.key_hash",
        lambda folder, key: shard_index.key_hash(key) >> 32,  # the upper half differs, too
        {"key": "a"},
        {"key": "b"},
    ),
    Identity(
        "data.shards.index.sample_crc32",
        lambda folder, key, parts: shard_index.sample_crc32(key, parts),
        {"key": "a", "parts": {"png": b"1", "json": b"2"}},
        {"key": "b", "parts": {"png": b"2", "json": b"1"}},
        {"the order of the parts": {"parts": {"json": b"2", "png": b"1"}}},
        through=["data.shards.index.members_crc32"],
    ),
    Identity(
        "data.samples.latents.latent_seed",
        lambda folder, **names: latent_seed(**names),
        {"seed": 0, "epoch": 1, "key": "a"},
        {"seed": 1, "epoch": 0, "key": "b"},
    ),
    Identity(
        "data.samples.text.SentencePieceTextTokenizer.fingerprint",
        lambda folder, captions: (
            text.train_text_tokenizer(captions, folder, 340).fingerprint,
            files.read_json(folder / "config.json"),
        ),
        {"captions": ["a red cat", "a blue dog"]},
        {"captions": ["a red cat", "two hens and a goose"]},
        {"the order of the captions": {"captions": ["a blue dog", "a red cat"]}},
        through=["data.samples.text.SentencePieceTextTokenizer.__init__", "data.samples.text._config"],
    ),
    Identity(
        "data.samples.text.QwenTextTokenizer.fingerprint",
        lambda folder, merges, name: text.QwenTextTokenizer(Tokenizer(merges, name)).fingerprint,  # type: ignore[arg-type]
        {"merges": "a b", "name": "x"},
        {"merges": "b a"},
        {"where it comes from": {"name": "y"}},
        through=["data.samples.text.QwenTextTokenizer.__init__"],
    ),
    Identity(
        "data.sources.webdataset._shard_key",
        lambda folder, prefix, key: webdataset._shard_key(prefix, key),
        {"prefix": "tar", "key": "é" * 90},
        {"prefix": "rat", "key": "é" * 89 + "è"},
        through=["data.sources.webdataset._digest"],
    ),
    Identity(
        "data.sources.webdataset._prefixes",
        lambda folder, first, second: webdataset._prefixes([first, second]),
        {"first": "x/1.tar", "second": "y/1.tar"},
        {"first": "z/1.tar", "second": "z/1.tar"},
    ),
    Identity(
        "data.sources.webdataset.WebDatasetSource.description",
        tars,
        {"content": {"1.tar": b"a", "2.tar": b"b"}, "fields": ("caption",)},
        {"content": {"1.tar": b"a", "2.tar": b"bc"}, "fields": ("other",)},
        through=["data.sources.webdataset.WebDatasetSource.__init__"],
    ),
    Identity(
        "data.sources.caption_table.CaptionTable.description",
        table,
        {
            "content": "red",
            "name": "t.jsonl",
            "columns": {"caption": "x", "other": "y"},
            "key": "key",
            "url": "url",
            "layout": 1,
            "join": "url",
        },
        {
            "content": "blue",
            "name": "u.jsonl",
            "columns": {"other": "y", "caption": "x"},
            "key": "key2",
            "url": "url2",
            "layout": 2,
            "join": "key",
        },
        through=[
            "data.sources.caption_table.CaptionTable.__init__",
            "data.sources.caption_table._identity",
        ],
    ),
    Identity(
        "data.sources.caption_table._key_hash",
        lambda folder, key: caption_table._key_hash(key),
        {"key": "12"},
        {"key": "120"},
        {"zeros before a number": {"key": "000000012"}},
    ),
    Identity(
        "data.sources.caption_table._url_hash",
        lambda folder, url: caption_table._url_hash(url),
        {"url": "http://a"},
        {"url": "http://b"},
    ),
    Identity(
        "data.sources.image_folder.FolderSource.description",
        image_folder,
        {"content": {"x/1.png": b"", "y/2.png": b""}, "listing": None, "labels": False, "above": "."},
        {"content": {"x/1.png": b"", "y/3.png": b""}, "listing": "{}\n", "labels": True},
        {"the folder above": {"above": "elsewhere"}},
        through=["data.sources.image_folder.FolderSource.__init__"],
    ),
    Identity(
        "data.sources.image_folder.FolderSource.description",
        image_folder,
        {"content": {"x/1.png": b""}, "listing": "{}\n", "labels": False, "above": "."},
        {"listing": "{} \n"},
        {"other images": {"content": {"x/2.png": b""}}},
    ),
    Identity(
        "data.sources.imagenet.ImageNetSource.description",
        imagenet,
        {"members": {"1.JPEG": b"a", "2.JPEG": b"b"}, "labels": "0\n1\n"},
        {"members": {"1.JPEG": b"a", "3.JPEG": b"b"}, "labels": "1\n0\n"},
        through=["data.sources.imagenet.ImageNetSource.__init__"],
    ),
    Identity(
        "data.sources.parquet.ParquetSource.description",
        parquet,
        {
            "rows": 4,
            "name": "a.parquet",
            "captions": ("caption",),
            "image": "image",
            "per_shard": 2,
            "task": "all",
        },
        {
            "rows": 5,
            "name": "b.parquet",
            "captions": ("other",),
            "image": "image2",
            "per_shard": 1,
            "task": "some",
        },
        through=["data.sources.parquet.ParquetSource.__init__"],
    ),
    Identity(
        "data.sources.omniedit.OmniEditFilter.description",
        lambda folder, scores, tasks: OmniEditFilter(scores, tasks).description,
        {"scores": {"o_score": 7.0}, "tasks": ("swap", "add")},
        {"scores": {"o_score": 8.0}, "tasks": ("swap",)},
        {"the order of the tasks": {"tasks": ("add", "swap")}},
    ),
    fields_identity(
        "data.sources.prepare.Preparation.description",
        Preparation(**PREPARED),
        lambda prepare: prepare.description,
        {
            "resolution": 128,
            "min_px": 33,
            "max_aspect": 3.0,
            "min_words": 2,
            "max_words": 8,
            "min_letters": 3,
            "max_letters": 99,
            "encoding": "png",
            "fit": "pad",
        },
    ),
    Identity(
        "data.sources.write._identity",
        written_as,
        {"source": "a folder", "recipe": 1, "prepare": PREPARED, "bits": 3},
        {"source": "a tar", "recipe": 2, "prepare": None, "bits": None},
    ),
    Identity(
        "data.sources.deduplicate.description",
        lambda folder, bits: deduplicate.description(bits),
        {"bits": 1},
        {"bits": 2},
    ),
    Identity(
        "data.sources.deduplicate._hash_sample",
        hashed,
        {"key": "a", "source": 1, "target": 2, "instructions": "swap"},
        {"source": 3, "target": 4, "instructions": "add"},
        {"the key": {"key": "b"}},
    ),
    Identity(
        "data.sources.base.InUnits.description",
        lambda folder, source, number: InUnits(Words(source), number).description,  # type: ignore[arg-type]
        {"source": "a", "number": 4},
        {"source": "b", "number": 2},
    ),
    Identity(
        "data.sources.draws.Shuffled.description",
        lambda folder, source, seed: Shuffled(Words(source), seed).description,  # type: ignore[arg-type]
        {"source": "a", "seed": 4},
        {"source": "b", "seed": 2},
    ),
    Identity(
        "data.sources.draws.Draws",
        lambda folder, **names: Draws(**names).below(1 << 62),
        {"seed": 1, "stream": "a", "index": 0},
        {"seed": 2, "stream": "b", "index": 1},
        through=["data.sources.draws.philox_key"],
    ),
)
