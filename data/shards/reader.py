"""Reads samples by index and checks every byte."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.config import StorageConfig
from data.shards.block_cache import BlockCache, Descriptor
from data.shards.index import (
    MANIFEST_NAME,
    RECORD,
    TAR_BLOCK_BYTES,
    Manifest,
    Records,
    Sample,
    ShardEntry,
    extents,
    members_crc32,
)
from data.shards.index_files import (
    CONTINUE,
    READ_ATTEMPTS,
    RETRY_WAIT_S,
    IndexFiles,
    load_index,
    read_index,
)
from data.shards.remote_folder import RemoteFolder, check_sizes, fetch_indices, read_manifest
from data.shards.remote_shards import RemoteShards
from data.shards.storage import GIB, Range, ShardBytes, in_threads, is_remote, retrying

MAX_OPEN_SHARDS = 128
OPEN_THREADS = 8
REPAIR = "delete this shard and run the writer again"
NAME_BYTES = 100  # name field of a USTAR header; our names always fit


class DamagedSampleError(UserError):
    """The bytes of a sample differ from those that were written."""


class ShardDataset:
    """A finished data set; indices 0 .. len - 1 number its samples in shard order. Several threads may read."""

    def __init__(
        self,
        directory: str | Path,
        manifest: Manifest,
        indices: Sequence[Path | Records],
        payloads: ShardBytes | None = None,
    ) -> None:
        """`directory`: for messages; `indices`: checked files or records; `payloads`: None: the local tars."""
        self.directory = directory
        self.manifest = manifest
        self._indices = IndexFiles(indices, [entry.num_samples for entry in manifest.shards])
        self._paths = [f"{directory}/{entry.name}" for entry in manifest.shards]
        self._payloads = LocalShards(self._paths) if payloads is None else payloads
        self._first = np.cumsum([0, *(entry.num_samples for entry in manifest.shards)])  # ends with the total

    @staticmethod
    def open(
        location: str | Path, storage: StorageConfig | None = None, leave_out: Collection[str] = ()
    ) -> ShardDataset:
        """Opens a folder or fsspec url (s3://, gs://, https://, hf://, memory://, ...) without the shards `leave_out`.

        `storage`: settings for urls. Raises UserError: a missing or damaged manifest, an empty data set, a missing or
        short shard, an index that is missing or belongs to another shard, or storage that fails permanently.
        """
        if is_remote(location):
            return _open_remote(str(location), storage or StorageConfig(), leave_out)
        directory = Path(str(location).removeprefix("file://"))
        manifest = _without(Manifest.read(directory), leave_out, directory)
        in_threads(lambda entry: len(open_shard(directory, entry)), manifest.shards, OPEN_THREADS)
        return ShardDataset(directory, manifest, [directory / entry.index_name for entry in manifest.shards])

    @property
    def fingerprint(self) -> str:
        """Digest of the manifest. Equal fingerprints mean equal samples in equal order."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.manifest.num_samples

    @functools.cached_property
    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [len]: first 8 bytes of SHA-256 of each key."""
        return self._column("key_hash", np.uint64)

    @property
    def num_image_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [len]: latent tokens of all images of each sample. Not cached, as packers need it once."""
        return self._column("num_image_tokens", np.int64)

    @property
    def num_text_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [len]: tokens of each sample's longest caption, without <|im_start|> and <|im_end|>."""
        return self._column("num_text_tokens", np.int64)

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[Sample]:
        """The samples at `indices`, in that order. Neighbours in a shard are read together.

        Raises UserError naming shard and key: a short file, a wrong CRC-32, or another sample's bytes.
        """
        ordered, place = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        ranges, cuts, records = self._runs(ordered)
        # Columns become lists of Python numbers: reading numpy's one by one takes longer than reading the samples.
        fields = ("offset", "part_bytes", "header_blocks", "crc32")
        rows = list(zip(*(records[name].tolist() for name in fields), strict=True))
        samples: list[Sample] = []
        for run, block, (a, b) in zip(
            ranges, self._payloads.read(ranges), itertools.pairwise(cuts), strict=True
        ):
            try:
                samples += self._parse(run, block, rows[a:b])
            except DamagedSampleError:
                if not self._payloads.forget(run):
                    raise
                (block,) = self._payloads.read([run])
                samples += self._parse(run, block, rows[a:b])
        return [samples[position] for position in place.tolist()]

    def will_need(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Starts reading these samples in the background, so that later `read`s, in any order, find them cached."""
        self._payloads.will_need(self._runs(np.unique(np.asarray(indices, np.int64)))[0])

    def _column(self, name: str, dtype: type[Any]) -> npt.NDArray[Any]:
        column = np.empty(len(self), dtype)
        for index, first in zip(self._indices, self._first.tolist(), strict=False):
            column[first : first + len(index)] = index[name]
        return column

    def _runs(self, ordered: npt.NDArray[np.int64]) -> tuple[list[Range], list[int], Records]:
        """Runs of neighbours among sorted indices: (byte range of each, begin of each run and the end, all records)."""
        if len(ordered) == 0:
            return [], [0], np.empty(0, RECORD)
        if ordered[0] < 0 or ordered[-1] >= len(self):
            raise IndexError(f"sample index outside 0 .. {len(self) - 1}")
        shards = np.searchsorted(self._first, ordered, side="right") - 1
        records = self._indices.take(shards, ordered - self._first[shards])
        starts = records["offset"].astype(np.int64)
        ends = starts + extents(records)
        breaks = np.flatnonzero((starts[1:] != ends[:-1]) | (shards[1:] != shards[:-1])) + 1
        cuts = [0, *breaks.tolist(), len(records)]
        firsts, lasts = cuts[:-1], np.array(cuts[1:]) - 1
        num_bytes = ends[lasts] - starts[firsts]
        ranges = list(zip(shards[firsts].tolist(), starts[firsts].tolist(), num_bytes.tolist(), strict=True))
        return ranges, cuts, records

    def _parse(self, run: Range, block: bytes | memoryview, rows: Sequence[tuple[Any, ...]]) -> list[Sample]:
        shard, start, _ = run
        path = self._paths[shard]
        return [_parse_sample(block, start, row, path) for row in rows]


class LocalShards:
    """ShardBytes of local files. Uses `pread`: under mmap, a truncated file would kill the process (SIGBUS)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._descriptor = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(
            lambda shard: Descriptor(paths[shard])
        )

    def read(self, ranges: Sequence[Range]) -> Iterator[memoryview]:
        """See ShardBytes. After an I/O error the read is repeated on a fresh descriptor."""
        # All ranges share one buffer: page faults of fresh memory would take longer than the reads.
        buffer = memoryview(bytearray(max((num_bytes for _, _, num_bytes in ranges), default=0)))
        for shard, offset, num_bytes in ranges:
            block = buffer[:num_bytes]
            action = functools.partial(self._pread, shard, offset, block)
            retrying(action, self._paths[shard], READ_ATTEMPTS, RETRY_WAIT_S)
            yield block

    def will_need(self, ranges: Sequence[Range]) -> None:
        """See ShardBytes. Asks the kernel to read ahead."""
        if not hasattr(os, "posix_fadvise"):  # Linux only
            return
        for shard, start, num_bytes in ranges:
            with contextlib.suppress(OSError):  # only a hint; `read` reports errors
                os.posix_fadvise(self._descriptor(shard).number, start, num_bytes, os.POSIX_FADV_WILLNEED)

    def forget(self, block: Range) -> bool:
        """See ShardBytes. There are no copies to drop."""
        return False

    def _pread(self, shard: int, offset: int, block: memoryview) -> None:
        """Fills `block` with a shard's bytes from `offset`. Raises OSError."""
        try:
            descriptor = self._descriptor(shard)
            while block:
                num_bytes = os.preadv(descriptor.number, [block], offset)
                if num_bytes == 0:
                    raise UserError(f"{self._paths[shard]}: shard ends at byte {offset}; {REPAIR}")
                offset, block = offset + num_bytes, block[num_bytes:]
        except OSError:
            self._descriptor.cache_clear()
            raise


def open_shard(directory: Path, entry: ShardEntry) -> Records:
    """The index of one shard. Raises UserError: tar or index is not the manifest's."""
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
    content = read_index(index_path, entry.num_samples)
    if hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise UserError(f"{index_path}: is not the index of {entry.name} in {MANIFEST_NAME}; {CONTINUE}")
    return load_index(content, entry.num_samples, index_path)


def _open_remote(url: str, storage: StorageConfig, leave_out: Collection[str]) -> ShardDataset:
    folder = RemoteFolder(url, storage)
    manifest = _without(read_manifest(folder), leave_out, folder.url)
    check_sizes(folder, manifest.shards)
    indices = fetch_indices(folder, manifest.shards, storage.cache / "indices" / manifest.fingerprint[:32])
    cache = BlockCache(storage.cache, manifest.fingerprint, int(storage.cache_gib * GIB))
    payloads = RemoteShards(folder, manifest.shards, cache, storage.parallel_reads)
    return ShardDataset(folder.url, manifest, indices, payloads)


def _without(manifest: Manifest, leave_out: Collection[str], where: str | Path) -> Manifest:
    """The manifest without the shards `leave_out`, with its fingerprint. Raises UserError: a name leads elsewhere."""
    names = {entry.name for entry in manifest.shards}
    for name in names:
        if Path(name).name != name or name.startswith(".") or "\\" in name:
            raise UserError(
                f"{where}/{MANIFEST_NAME}: shard name {name!r} is no plain file name; do not use this data"
            )
    if not names.issuperset(leave_out):
        unknown = sorted(set(leave_out) - names)[0]
        raise UserError(
            f"{where}: has no shard '{unknown}' to leave out; give the quarantine file of this data set"
        )
    shards = tuple(entry for entry in manifest.shards if entry.name not in leave_out)
    if not shards:
        raise UserError(f"{where}: every shard is left out; give other data")
    return replace(manifest, shards=shards, num_samples=sum(entry.num_samples for entry in shards))


def _parse_sample(block: bytes | memoryview, block_start: int, row: tuple[Any, ...], path: str) -> Sample:
    """Cuts one sample out of a block: names come from the tar headers, lengths from the index."""
    offset, part_bytes, header_blocks, crc32 = row
    begin = offset - block_start
    members = []
    for num_bytes, num_headers in zip(part_bytes, header_blocks, strict=True):
        if num_bytes == 0:
            break
        begin += num_headers * TAR_BLOCK_BYTES
        header = begin - TAR_BLOCK_BYTES  # the last header block is the payload's own
        name = bytes(block[header : header + NAME_BYTES]).partition(b"\0")[0]
        members.append((name, bytes(block[begin : begin + num_bytes])))
        begin += -(-num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    found = members_crc32(members)
    names = [name.decode("ascii", "replace").partition(".") for name, _ in members]
    if found != crc32:  # it covers names and payloads, so another sample's bytes fail, too
        raise DamagedSampleError(
            f"{path}: sample '{names[0][0]}' at byte {offset} is damaged (CRC-32); {REPAIR}"
        )
    parts = {part: payload for (_, _, part), (_, payload) in zip(names, members, strict=True)}
    return Sample(names[0][0], parts, shard=path)
