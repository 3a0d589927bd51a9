"""Samples a second from latent shards: our reader against webdataset on equal files, one process, page cache warm.

Our reader reads in planned (random) order, checks length and crc32 of every sample, and prefetches nothing here.
webdataset reads the shards front to back, as it always does. The readers take turns, and the ratio is the median over
the rounds: other work on the machine slows both readers of a round.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from data.plan.plan import epoch_order
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter

NUM_SAMPLES = 4000
SHAPE = (64, 16, 16)
BLOCK_SAMPLES = 64
NUM_ROUNDS = 11


def report() -> None:
    """Prints one line for each reader: the best and the median rate, and the ratio to the first reader."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write(directory)
        dataset = ShardDataset.open(directory)
        order = epoch_order(len(dataset), dataset.fingerprint, 0, 0, 1, 0)
        tars = [str(path) for path in sorted(directory.glob("*.tar"))]
        readers: dict[str, Callable[[], int]] = {
            "webdataset, decoded (json, latent as array)": lambda: read_webdataset(tars, decode=True),
            "webdataset, raw bytes": lambda: read_webdataset(tars, decode=False),
            "ours, planned order, checked, decoded": lambda: read_ours(dataset, order, decode=True),
            "ours, planned order, checked, raw bytes": lambda: read_ours(dataset, order, decode=False),
            "page cache (the tars' bytes, 1 MiB at a time)": lambda: read_bytes(tars),
        }
        rounds = [{name: seconds(reader) for name, reader in readers.items()} for _ in range(NUM_ROUNDS)]
    first = next(iter(readers))
    for name in readers:
        best, median = (NUM_SAMPLES / of(times[name] for times in rounds) for of in (min, statistics.median))
        ratio = statistics.median(times[first] / times[name] for times in rounds)
        print(f"reading, {name:45s} best {best:7,.0f}, median {median:7,.0f} samples/s  {ratio:.2f}x")


def write(directory: Path) -> None:
    """Writes random bf16 latents of the paper's size, 32 KiB a sample."""
    rng = np.random.Generator(np.random.Philox(0))
    meta = json.dumps({"caption": "a red apple on a blue background"}).encode()
    latent = LatentInfo("bf16", SHAPE, (0.0,) * SHAPE[0], (1.0,) * SHAPE[0], "none", "none")
    with ShardWriter(directory, max_samples_per_shard=1000, source="benchmark", latent=latent) as writer:
        for index in range(NUM_SAMPLES):
            payload = rng.integers(0, 2**16, int(np.prod(SHAPE)), dtype=np.uint16).tobytes()
            writer.write(Sample(f"sample-{index:06d}", {"latent": payload, "json": meta}))


def read_webdataset(tars: list[str], *, decode: bool) -> int:
    """Reads all samples once; returns their number."""
    stream = webdataset.WebDataset(tars, shardshuffle=False)
    if decode:
        stream = stream.map_dict(
            latent=lambda raw: np.frombuffer(raw, np.uint16).reshape(SHAPE).copy(), json=json.loads
        )
    return sum(1 for _ in stream)


def read_ours(dataset: ShardDataset, order: np.ndarray, *, decode: bool) -> int:
    """Reads all samples once in planned order, block by block; returns their number."""
    num_samples = 0
    for start in range(0, len(order), BLOCK_SAMPLES):
        for sample in dataset.read(order[start : start + BLOCK_SAMPLES]):
            num_samples += 1
            if decode:
                np.frombuffer(sample.parts["latent"], np.uint16).reshape(SHAPE).copy()
                json.loads(sample.parts["json"])
    return num_samples


def read_bytes(tars: list[str]) -> int:
    """Reads every byte once into one buffer: the limit for any reader; returns the number of samples."""
    buffer = bytearray(1 << 20)
    for path in tars:
        with Path(path).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return NUM_SAMPLES


def seconds(reader: Callable[[], int]) -> float:
    """Seconds of one pass."""
    begin_s = time.perf_counter()
    assert reader() == NUM_SAMPLES
    return time.perf_counter() - begin_s
