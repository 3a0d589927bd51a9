"""Reads samples by index with coalesced `pread`s, every byte checked (contract 1).

`pread`, not mmap, for payloads: a truncated file under mmap kills the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.shard_index import (
    MANIFEST_NAME,
    RECORD,
    REJECTED_NAME,
    TAR_BLOCK_BYTES,
    Manifest,
    Records,
    Sample,
    ShardEntry,
    extents,
    key_hash,
    sample_crc32,
)
from engine import files
from engine.config import UserError

MAX_OPEN_SHARDS = 128
READ_ATTEMPTS = 3
RETRY_WAIT_S = 0.5
CONTINUE = "run the writer again (make_shards or encode_latents), it continues there"
REPAIR = "delete this shard and run the writer again"
NAME_BYTES = 100  # of a USTAR header; our names always fit


class ShardDataset:
    """A finished data set, addressed 0 .. len - 1 in shard order. Safe to read from several threads."""

    def __init__(self, directory: Path, manifest: Manifest, indices: Sequence[Records]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._indices = indices
        self._paths = [str(directory / entry.name) for entry in manifest.shards]
        self._first = np.cumsum([0, *(len(index) for index in indices)])  # of each shard, then the total
        self._descriptor = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(
            lambda shard: _Descriptor(self._paths[shard])
        )

    @staticmethod
    def open(directory: str | Path) -> ShardDataset:
        """Opens manifest.json and the indices (memory-mapped).

        Raises UserError: no or damaged manifest, an empty data set, a missing or short shard, an index that
        is missing or belongs to another shard.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        return ShardDataset(directory, manifest, [_open_shard(directory, entry) for entry in manifest.shards])

    @property
    def fingerprint(self) -> str:
        """Digest of the manifest: equal fingerprints mean the same samples in the same order."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.manifest.num_samples

    @functools.cached_property
    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [len]: first 8 bytes of SHA-256 of each key."""
        return np.concatenate([index["key_hash"] for index in self._indices])

    @functools.cached_property
    def num_image_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [len]: latent tokens of all images of each sample."""
        return np.concatenate([index["num_image_tokens"] for index in self._indices]).astype(np.int64)

    @functools.cached_property
    def num_text_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [len]: tokens of the longest caption of each sample, without <|im_start|> and <|im_end|>."""
        return np.concatenate([index["num_text_tokens"] for index in self._indices]).astype(np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Sample]:
        """The samples at `indices`, in that order. One `pread` for every run of neighbours in a shard.

        Raises UserError naming shard and key: short file, wrong CRC-32, another sample's bytes.
        """
        wanted = np.asarray(indices, np.int64)
        ordered, place = np.unique(wanted, return_inverse=True)
        samples: list[Sample] = []
        for shard, start, num_bytes, records in self._runs(ordered):
            block = self._pread(shard, start, num_bytes)
            samples += [
                _parse_sample(block, start, record, self._paths[shard]) for record in records.tolist()
            ]
        return [samples[position] for position in place.tolist()]

    def will_need(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Asks the kernel to read these samples ahead; later `read`s, in any order, find them cached."""
        if not hasattr(os, "posix_fadvise"):  # Linux only
            return
        for shard, start, num_bytes, _ in self._runs(np.unique(np.asarray(indices, np.int64))):
            with contextlib.suppress(OSError):  # only a hint; `read` tells what is wrong
                os.posix_fadvise(self._descriptor(shard).number, start, num_bytes, os.POSIX_FADV_WILLNEED)

    def _runs(self, ordered: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int, Records]]:
        """(shard, first byte, bytes, records) of every run of neighbours among sorted indices."""
        if len(ordered) and (ordered[0] < 0 or ordered[-1] >= len(self)):
            raise IndexError(f"sample index outside 0 .. {len(self) - 1}")
        shards = np.searchsorted(self._first, ordered, side="right") - 1
        for shard in np.unique(shards).tolist():
            records = self._indices[shard][ordered[shards == shard] - self._first[shard]]
            starts = records["offset"].astype(np.int64)
            ends = starts + extents(records)
            breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
            for a, b in itertools.pairwise([0, *breaks.tolist(), len(records)]):
                yield shard, int(starts[a]), int(ends[b - 1] - starts[a]), records[a:b]

    def _pread(self, shard: int, offset: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` at `offset`; an I/O error is tried again on a fresh descriptor."""
        path = self._paths[shard]
        for attempt in range(READ_ATTEMPTS):
            if attempt > 0:
                time.sleep(RETRY_WAIT_S * attempt)
            try:
                return _pread_all(self._descriptor(shard), offset, num_bytes, path)
            except OSError as error:
                self._descriptor.cache_clear()
                reason = error
        raise UserError(f"{path}: cannot be read ({reason}); check the disk or the mount")


def verify(directory: str | Path) -> list[str]:
    """Reads everything again and returns every problem found, each naming its file; [] means sound."""
    try:
        manifest = Manifest.read(Path(directory))
    except UserError as error:
        return [str(error)]
    problems: list[str] = []
    rejected = Path(directory) / REJECTED_NAME
    num_rejected = len(rejected.read_text().splitlines()) if rejected.is_file() else 0
    if num_rejected != manifest.num_rejected:
        problems.append(f"{rejected}: has {num_rejected} lines, {MANIFEST_NAME} says {manifest.num_rejected}")
    for entry in manifest.shards:
        path = Path(directory) / entry.name
        try:
            index = _open_shard(Path(directory), entry)
        except UserError as error:
            problems.append(str(error))
            continue
        if files.sha256(path) != entry.sha256:
            problems.append(f"{path}: SHA-256 differs from {MANIFEST_NAME}")
        alone = dataclasses.replace(manifest, shards=(entry,), num_samples=entry.num_samples)
        dataset = ShardDataset(Path(directory), alone, [index])
        for position in range(len(index)):
            try:
                (sample,) = dataset.read([position])
                for part in sample.parts:
                    if part == "json" or part.endswith(".json"):
                        json.loads(sample.parts[part])
            except UserError as error:
                problems.append(str(error))
            except ValueError:
                problems.append(f"{sample.where}: part '{part}' is not JSON")
    return problems


class _Descriptor:
    """An open file, closed when the last reader lets go of it; eviction cannot close it under a reader."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _open_shard(directory: Path, entry: ShardEntry) -> Records:
    """The memory-mapped index of one shard, after checking that tar and index are the manifest's."""
    path, index_path = directory / entry.name, directory / entry.index_name
    if not path.is_file():
        raise UserError(f"{path}: shard is missing; {CONTINUE}")
    num_bytes = path.stat().st_size
    if num_bytes != entry.num_bytes:
        raise UserError(
            f"{path}: shard has {num_bytes} bytes, {MANIFEST_NAME} says {entry.num_bytes}; {CONTINUE}"
        )
    if not index_path.is_file():
        raise UserError(f"{index_path}: index is missing; {CONTINUE}")
    if files.sha256(index_path) != entry.index_sha256:
        raise UserError(f"{index_path}: is not the index of {entry.name} in {MANIFEST_NAME}; {CONTINUE}")
    index: Records = np.load(index_path, mmap_mode="r").view(np.ndarray)  # np.memmap's slicing is slow
    if index.dtype != RECORD or len(index) != entry.num_samples:
        raise UserError(f"{index_path}: not {entry.num_samples} records of this format; {CONTINUE}")
    return index


def _pread_all(descriptor: _Descriptor, offset: int, num_bytes: int, path: str) -> bytes:
    pieces: list[bytes] = []
    while num_bytes > 0:
        piece = os.pread(descriptor.number, num_bytes, offset)
        if not piece:
            raise UserError(f"{path}: shard ends at byte {offset}; {REPAIR}")
        pieces.append(piece)
        offset, num_bytes = offset + len(piece), num_bytes - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _parse_sample(block: bytes, block_start: int, record: tuple[Any, ...], path: str) -> Sample:
    """Cuts one sample out at its tar headers: names come from the headers, lengths from the index."""
    expected_hash, offset, part_bytes, _, _, crc = record
    begin = offset - block_start
    key, parts = "", {}
    for num_bytes in part_bytes.tolist():
        if num_bytes == 0:
            break
        name = block[begin : begin + NAME_BYTES].split(b"\0", 1)[0].decode("ascii", "replace")
        key, _, part = name.partition(".")
        begin += TAR_BLOCK_BYTES
        parts[part] = block[begin : begin + num_bytes]
        begin += -(-num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    if sample_crc32(key, parts) != crc or key_hash(key) != expected_hash:
        raise UserError(f"{path}: sample '{key}' at byte {offset} is damaged (CRC-32); {REPAIR}")
    return Sample(key, parts, shard=path)
