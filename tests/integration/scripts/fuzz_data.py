"""Shards, tars, tables, folders and lists of images, for the fuzz run."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from base import files
from data.doctor.examine_set import diagnose
from data.samples.images import decode_image, image_parts, read_rgb_file
from data.samples.latents import read_latents
from data.shards import LatentInfo, Sample, ShardDataset, shard_name, write_manifest, write_shard
from data.shards.quarantine import read_quarantine
from data.shards.verification import verify
from data.sources.base import BadItemError, InUnits, Source
from data.sources.caption_table import CaptionTable, build_caption_table
from data.sources.image_folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.omniedit import OmniEditFilter, omniedit_source
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.tar_indexing import index_shards
from data.sources.tar_samples import find_tars
from data.sources.webdataset import WebDatasetSource
from helpers.trees import tar_of
from integration.scripts.fuzz_inputs import IMAGE, Case, lines, parquet_of, png, put


def pixel_shards(folder: Path) -> None:
    trees = [{"captions": {"alt": f"a red square {n}"}, "width": 9} for n in range(3)]
    samples = [
        Sample(f"k{n}", {"png": png(), "json": json.dumps(tree).encode()}) for n, tree in enumerate(trees)
    ]
    write_set(folder, samples, None)


def latent_shards(folder: Path) -> None:
    latent = LatentInfo("fp32", (2, 2, 2), (0.0, 0.5), (1.0, 2.0), "autoencoder", "text")
    payload = np.arange(latent.num_bytes // 4, dtype=np.float32).tobytes()
    samples = [Sample(f"k{n}", {"latent": payload, "json": b'{"caption": "a dog"}'}) for n in range(3)]
    write_set(folder, samples, latent)


def write_set(folder: Path, samples: Sequence[Sample], latent: LatentInfo | None) -> None:
    write_shard(folder / shard_name(0), samples, [(4, 3)] * len(samples), source="test")
    write_manifest(folder, [shard_name(0)], source="test", latent=latent)


def sign_shards(folder: Path) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    for entry in tree["shards"]:
        tar = folder / entry["name"]
        entry["num_bytes"] = tar.stat().st_size
        entry["index_sha256"] = files.sha256(tar.with_name(tar.name.replace(".tar", ".index.npy")))
    tree["fingerprint"] = files.digest({**tree, "fingerprint": ""})
    path.write_text(json.dumps(tree))


def everything(source: Source) -> None:
    prepare = Preparation(encoding="png")
    for unit in range(len(source.units)):
        for item in source.items(unit):
            with contextlib.suppress(BadItemError):
                if isinstance(item, Sample):
                    prepare(item)


def read_shards(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    for sample in dataset.read(range(len(dataset))):
        for part in image_parts(sample.parts):
            decode_image(sample, part)


def read_latent_shards(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    latent = dataset.manifest.latent
    if latent is not None:
        read_latents(dataset.read(range(len(dataset))), ["latent"], latent)


def read_indexed(folder: Path) -> None:
    index_shards(folder)
    read_shards(folder)


def captions_of(folder: Path) -> None:
    paths = sorted(folder.glob("*.json*")) + sorted(folder.glob("*.parquet"))
    build_caption_table(paths, folder / "t.sqlite", columns={"caption": "alt"})
    with contextlib.suppress(BadItemError):
        CaptionTable(folder / "t.sqlite").find("a", "1", "http://x/1.png")


WEBDATASET = {
    "a.png": png(),
    "a.json": b'{"caption": "a dog", "url": "http://x/1", "label": 0}',
    "a.txt": b"a dog",
    "b.jpg": png(9, "JPEG"),
    "b.txt": b"two dogs",
    "b.cls": b"0",
}

CASES: dict[str, Case] = {
    "pixel shards": Case(pixel_shards, read_shards, sign=sign_shards),
    "latent shards": Case(latent_shards, read_latent_shards, sign=sign_shards),
    "doctor": Case(pixel_shards, diagnose, sign=sign_shards),
    "verify": Case(latent_shards, verify, sign=sign_shards),
    "tars in place": Case(lambda folder: put(folder, {"a.tar": tar_of(WEBDATASET.items())}), read_indexed),
    "tars": Case(
        lambda folder: put(folder, {"a.tar": tar_of(WEBDATASET.items())}),
        lambda folder: everything(WebDatasetSource(find_tars([folder]))),
    ),
    "imagenet": Case(
        lambda folder: put(
            folder, {f"n0000000{n}.tar": tar_of([(f"n0000000{n}_1.JPEG", png(9, "JPEG"))]) for n in (1, 2)}
        ),
        lambda folder: everything(InUnits(ImageNetSource(folder, num_classes=2), 2)),
    ),
    "parquet": Case(
        lambda folder: put(
            folder,
            {"a.parquet": parquet_of(image=[IMAGE] * 3, text=["a dog", "x", "y"], key=["a", "b", "c"])},
        ),
        lambda folder: everything(
            ParquetSource(
                [str(folder)], ParquetColumns(image="image", captions=("text",), key="key", kept=("key",)), 2
            )
        ),
    ),
    "parquet of classes": Case(
        lambda folder: put(folder, {"a.parquet": parquet_of(image=[IMAGE] * 3, label=[0, 1, 2])}),
        lambda folder: everything(
            ParquetSource([str(folder)], ParquetColumns(image="image", label="label"), 2)
        ),
    ),
    "omniedit": Case(
        lambda folder: put(
            folder,
            {
                "a.parquet": parquet_of(
                    omni_edit_id=["x", "y"],
                    task=["swap"] * 2,
                    src_img=[IMAGE] * 2,
                    edited_img=[IMAGE] * 2,
                    edited_prompt_list=[["add a hat"]] * 2,
                    sc_score_1=[3, 4],
                    sc_score_2=[3, 4],
                    pq_score=[1.0, 2.0],
                    o_score=[7.0, 8.0],
                )
            },
        ),
        lambda folder: everything(omniedit_source([str(folder)], 2, OmniEditFilter({"o_score": 6}))),
    ),
    "listing": Case(
        lambda folder: put(
            folder,
            {
                "images/a.png": png(),
                "images/b.jpg": png(9, "JPEG"),
                "list.jsonl": lines(
                    {"file": "a.png", "caption": "a dog"}, {"file": "b.jpg", "captions": {"alt": "x"}, "n": 1}
                ),
            },
        ),
        lambda folder: everything(InUnits(FolderSource(folder / "images", folder / "list.jsonl"), 3)),
    ),
    "folder": Case(
        lambda folder: put(
            folder, {"a.png": png(), "a.txt": "a dog", "b.png": png(), "b.txt": "x", "c.webp": png(9, "WEBP")}
        ),
        lambda folder: everything(InUnits(FolderSource(folder), 3)),
    ),
    "caption tables": Case(
        lambda folder: put(
            folder,
            {
                "a.jsonl": lines(
                    {"key": "1", "url": "http://x/1.png", "caption": "a dog"},
                    {"key": "2", "url": "", "caption": "x"},
                ),
                "b.jsonl.gz": gzip.compress(lines({"key": "3", "url": "http://x/3.png", "caption": "a dog"})),
                "c.parquet": parquet_of(key=["4"], url=["http://x/4.png"], caption=["x"]),
            },
        ),
        captions_of,
    ),
    "pictures": Case(
        lambda folder: put(folder, {"a.png": png(), "b.jpg": png(9, "JPEG"), "c.webp": png(9, "WEBP")}),
        lambda folder: [read_rgb_file(path) for path in sorted(folder.iterdir())],
    ),
    "quarantine": Case(
        lambda folder: put(
            folder,
            {"q.jsonl": lines({"key": "a", "reason": "x"}, {"shard": "shard-000000.tar", "reason": "y"})},
        ),
        lambda folder: read_quarantine(folder / "q.jsonl"),
    ),
}
