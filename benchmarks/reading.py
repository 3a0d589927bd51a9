"""Samples a second from latent shards: our reader against webdataset on the same files, one process, page cache warm.

Ours reads in planned (random) order, checks length and crc32 of every sample, and prefetches nothing here.
webdataset reads the shards front to back, as it does.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from data.plan import epoch_order
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from evaluation.environment import machine, versions

NUM_SAMPLES = 4000
SHAPE = (64, 16, 16)
BLOCK_SAMPLES = 64
REPEATS = 3


def main() -> None:
    """Prints one line a reader, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory)
        dataset = ShardDataset.open(directory)
        order = epoch_order(len(dataset), dataset.fingerprint, 0, 0, 1, 0)
        tars = [str(path) for path in sorted(directory.glob("*.tar"))]
        readers: dict[str, Callable[[], int]] = {
            "webdataset, decoded (json, latent as array)": lambda: read_webdataset(tars, decode=True),
            "webdataset, raw bytes": lambda: read_webdataset(tars, decode=False),
            "ours, planned order, crc32 checked": lambda: read_ours(dataset, order),
        }
        print(f"machine: {machine()}\nversions: {versions()}")
        rates = {name: best_rate(reader) for name, reader in readers.items()}
    for name, rate in rates.items():
        print(f"{name:45s} {rate:9,.0f} samples/s  {rate / next(iter(rates.values())):.2f}x")


def write(directory: Path) -> None:
    """Random bf16 latents of the paper's size, 32 KiB a sample."""
    rng = np.random.Generator(np.random.Philox(0))
    meta = json.dumps({"caption": "a red apple on a blue background"}).encode()
    latent = LatentInfo("bf16", SHAPE, (0.0,) * SHAPE[0], (1.0,) * SHAPE[0], "none", "none")
    with ShardWriter(directory, max_samples_per_shard=1000, source="benchmark", latent=latent) as writer:
        for index in range(NUM_SAMPLES):
            payload = rng.integers(0, 2**16, int(np.prod(SHAPE)), dtype=np.uint16).tobytes()
            writer.write(Sample(f"sample-{index:06d}", {"latent": payload, "json": meta}))


def read_webdataset(tars: list[str], *, decode: bool) -> int:
    """One pass; returns the number of samples."""
    stream = webdataset.WebDataset(tars, shardshuffle=False)
    if decode:
        stream = stream.map_dict(
            latent=lambda raw: np.frombuffer(raw, np.uint16).reshape(SHAPE).copy(), json=json.loads
        )
    return sum(1 for _ in stream)


def read_ours(dataset: ShardDataset, order: np.ndarray) -> int:
    """One pass in planned order, block by block."""
    blocks = [order[start : start + BLOCK_SAMPLES] for start in range(0, len(order), BLOCK_SAMPLES)]
    return sum(len(dataset.read(block.tolist())) for block in blocks)


def best_rate(reader: Callable[[], int]) -> float:
    """Samples a second of the fastest pass: the others had a neighbour on the machine."""
    seconds = []
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        assert reader() == NUM_SAMPLES
        seconds.append(time.perf_counter() - begin_s)
    return NUM_SAMPLES / min(seconds)


if __name__ == "__main__":
    main()
