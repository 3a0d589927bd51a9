"""The data layer against its targets, one run, page cache warm: python -m benchmarks.data

1. Reading (benchmarks/reading.py): samples a second of one process, ours (planned order, every byte checked) against
   plain webdataset (target 5x) and against the page cache itself.
2. Packing: fill of packs of 49,152 tokens on text-to-image and edit lengths, and samples lost.
3. Planning: 11 million samples in 1,100 shards: opening, and every pack of one epoch of all 32 streams, in a separate
   process.
4. Loading: CPU time a sample takes from file to packed batch, in cores per GPU at 450 samples a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from base import files
from benchmarks import reading
from data.config import PackingConfig
from data.packs.packing import T2IPacker
from data.plan.mixture import Member, Mixture
from data.plan.stream import PackStream
from data.samples.text import train_text_tokenizer
from data.shards import Sample, ShardDataset, ShardWriter, shard_name
from data.shards.index import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    RECORD,
    LatentInfo,
    Manifest,
    Records,
    ShardEntry,
)
from evaluation.environment import machine, versions

BUDGET_TOKENS = 49_152
NUM_STREAMS = 32
PLANNED_SHARDS, SAMPLES_PER_SHARD = 1_100, 10_000
FILL_SAMPLES = 1_000_000
LOADED_SAMPLES = 4_000
SAMPLES_PER_S_AND_GPU = 450
SHAPE = (64, 16, 16)
WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "large",
    "red",
    "house",
    "tree",
    "river",
    "person",
    "with",
    "under",
    "behind",
)


def main() -> None:
    """Prints every number beside its target."""
    print(f"machine: {machine()}\nversions: {versions()}")
    reading.report()
    fill()
    planning()
    loading()


def text_lengths(num_samples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Tokens of captions: log-normal around 90, 5 to 400, like long machine-made captions."""
    return np.clip(rng.lognormal(np.log(90), 0.5, num_samples), 5, 400).astype(np.int64)


class _Numbers:
    """Stands in for an opened data set, of which only lengths and key hashes are needed."""

    directory = Path("numbers")
    fingerprint = "numbers"

    def __init__(self, lengths: npt.NDArray[np.int64]) -> None:
        self.lengths = lengths
        self.key_hashes = np.arange(len(lengths)).astype(np.uint64)

    def __len__(self) -> int:
        return len(self.lengths)


class _Lengths:
    """Stands in for a packer, of which only the lengths are needed."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.budget_key = "the budget"

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Tokens of text and image, with their special tokens."""
        if isinstance(dataset, _Numbers):
            return dataset.lengths
        return dataset.num_text_tokens + dataset.num_image_tokens + 4

    def collate(self, *_: object, **__: object) -> None:  # type: ignore[override]
        """Never called."""


def fill() -> None:
    """Prints the share of the token budget that is used over one epoch of every stream, and the samples lost."""
    rng = np.random.Generator(np.random.Philox(0))
    text = text_lengths(FILL_SAMPLES, rng)
    edits = np.clip(rng.lognormal(np.log(18), 0.5, FILL_SAMPLES), 4, 200).astype(np.int64)
    for name, lengths in {"text-to-image": text + 256 + 4, "edits": edits + 2 * 256 + 6}.items():
        numbers = _Numbers(lengths)
        mixture = Mixture([Member("", numbers, fingerprint="numbers")])  # type: ignore[arg-type]
        stream = PackStream(
            mixture,
            _Lengths(BUDGET_TOKENS),
            num_streams=NUM_STREAMS,
            seed=0,
            rank=0,
            world=1,
            prefetch_steps=1,
        )  # type: ignore[arg-type]
        used, num_packs, packed = 0, 0, np.zeros(len(lengths), np.int64)
        for number in range(NUM_STREAMS):
            cursor = stream._cursor(number, only_counts=True)
            while (pack := cursor.next_pack())[0].max() == 0:
                used += int(lengths[pack[1]].sum())
                num_packs += 1
                packed[pack[1]] += 1
            first_epoch = pack[1][pack[0] == 0]
            packed[first_epoch] += 1
            pending = [address for epoch, address in cursor.state_dict()["pending"] if epoch == 0]
            packed[pending] += 1
        lost, twice = int((packed == 0).sum()), int((packed > 1).sum())
        print(
            f"packing, {name}: fill {used / num_packs / BUDGET_TOKENS:.4f} (target 0.997), "
            f"{lost} of {len(lengths):,} samples lost, {twice} met twice"
        )


def planning() -> None:
    """Runs `plan` on synthetic indices in a separate process, whose peak memory is the planning's."""
    with tempfile.TemporaryDirectory() as folder:
        _write_indices(Path(folder))
        child = [sys.executable, "-c", f"from benchmarks.data import plan; plan({folder!r})"]
        print(subprocess.run(child, check=True, capture_output=True, text=True).stdout, end="")  # noqa: S603  # our own command


def plan(folder: str) -> None:
    """Opens the data set and cuts every pack of the first epoch; prints seconds and peak resident memory."""
    imported_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    begin_s = time.perf_counter()
    dataset = ShardDataset.open(folder)
    stream = PackStream(
        Mixture.of(dataset),
        _Lengths(BUDGET_TOKENS),  # type: ignore[arg-type]
        num_streams=NUM_STREAMS,
        seed=0,
        rank=0,
        world=1,
        prefetch_steps=1,
    )
    open_s = time.perf_counter() - begin_s
    num_steps = stream.num_steps(1)
    total_s = time.perf_counter() - begin_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"planning, {len(dataset):,} samples: {total_s:.1f} s (target 10), of which opening {open_s:.1f} s; "
        f"{num_steps} steps of {NUM_STREAMS} packs; peak memory {peak_gb:.2f} GB (target 1; {imported_gb:.2f} GB of it "
        "are Python, torch and the imports)"
    )


def _write_indices(directory: Path) -> None:
    """Writes indices of random records; the tars are sparse files of the right size."""
    rng = np.random.Generator(np.random.Philox(1))
    entries = []
    for number in range(PLANNED_SHARDS):
        records: Records = np.zeros(SAMPLES_PER_SHARD, RECORD)
        records["key_hash"] = rng.integers(0, 2**63, SAMPLES_PER_SHARD)
        records["num_image_tokens"] = 256
        records["num_text_tokens"] = text_lengths(SAMPLES_PER_SHARD, rng)
        entry = ShardEntry(shard_name(number), 1 << 20, SAMPLES_PER_SHARD, "", "")
        np.save(directory / entry.index_name, records)
        with (directory / entry.name).open("wb") as tar:
            tar.truncate(entry.num_bytes)
        digest = hashlib.sha256((directory / entry.index_name).read_bytes()).hexdigest()
        entries.append(dataclasses.replace(entry, index_sha256=digest))
    num_samples = PLANNED_SHARDS * SAMPLES_PER_SHARD
    manifest = Manifest(FORMAT_VERSION, "benchmark", tuple(entries), None, num_samples, 0)
    manifest = dataclasses.replace(manifest, fingerprint=manifest.digest())
    files.write_json(directory / MANIFEST_NAME, dataclasses.asdict(manifest))


def loading() -> None:
    """Times whole packs, from shards to the tensors that the model takes, on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        rng = np.random.Generator(np.random.Philox(2))
        captions = [" ".join(rng.choice(WORDS, count)) for count in rng.integers(40, 80, LOADED_SAMPLES)]
        text_tokenizer = train_text_tokenizer(captions, directory / "text", 512)
        latent = LatentInfo("bf16", SHAPE, (0.0,) * 64, (1.0,) * 64, "none", text_tokenizer.fingerprint)
        with ShardWriter(
            directory / "set", max_samples_per_shard=1000, source="benchmark", latent=latent
        ) as writer:
            for index, caption in enumerate(captions):
                parts = {
                    "latent": rng.integers(0, 2**14, int(np.prod(SHAPE)), dtype=np.uint16).tobytes(),
                    "json": f'{{"caption": "{caption}"}}'.encode(),
                }
                writer.write(Sample(f"sample-{index:06d}", parts), 256, len(text_tokenizer.encode(caption)))
        packer = T2IPacker(PackingConfig(BUDGET_TOKENS), latent, text_tokenizer)
        mixture = Mixture.of(ShardDataset.open(directory / "set"))
        stream = PackStream(mixture, packer, num_streams=1, seed=0, rank=0, world=1, prefetch_steps=1)
        stream.next_step()  # brings files into the page cache and starts the thread
        num_samples, cpu_s, wall_s = 0, time.process_time(), time.perf_counter()
        while num_samples < LOADED_SAMPLES:
            stream.next_step()
            num_samples += int(stream.metrics()["samples"])
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        stream.close()
    cores = cpu_s / num_samples * SAMPLES_PER_S_AND_GPU
    print(
        f"loading, packs of {BUDGET_TOKENS:,} tokens: {1e3 * cpu_s / num_samples:.2f} ms CPU a sample = "
        f"{cores:.2f} cores per GPU at {SAMPLES_PER_S_AND_GPU} samples/s (target 0.5); "
        f"one rank alone {num_samples / wall_s:,.0f} samples/s"
    )


if __name__ == "__main__":
    main()
