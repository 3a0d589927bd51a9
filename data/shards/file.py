"""Writes one shard: a tar under a temporary name, its index and its side file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import numpy as np

from base import files
from base.config import UserError
from data.shards.index import (
    FORMAT_VERSION,
    KEY_PATTERN,
    MAX_PART_BYTES,
    MAX_PARTS,
    PART_PATTERN,
    RECORD,
    TAR_BLOCK_BYTES,
    Cut,
    Records,
    Sample,
    ShardEntry,
    ShardProgress,
    extents,
    index_name,
    key_hash,
    progress_name,
    sample_crc32,
)

Rejections = tuple[tuple[str, str], ...]


class OpenShard:
    """A shard that is being written: a tar under a temporary name, and its index records in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # left by a killed run
            stale.unlink()
        self._file = self._temporary.open("wb")
        import webdataset  # here, for it loads torch, which readers do not need

        # No user, group or time is stored, so that equal samples give equal bytes.
        self._tar = webdataset.TarWriter(self._file, encoder=False, user="", group="", mode=0o444, mtime=0)
        self._records: list[tuple[int, list[int], int, int, int]] = []
        self._keys: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Number of samples added so far."""
        return len(self._records)

    def add(self, sample: Sample, num_image_tokens: int = 0, num_text_tokens: int = 0) -> None:
        """Adds a sample. Raises UserError: a name that WebDataset cannot carry, an empty part, or a repeated key."""
        _check(sample, self._keys)
        self._keys.add(sample.key)
        part_bytes = [len(sample.parts[part]) for part in sorted(sample.parts)]
        part_bytes += [0] * (MAX_PARTS - len(part_bytes))
        crc = sample_crc32(sample.key, sample.parts)
        self._records.append((key_hash(sample.key), part_bytes, num_image_tokens, num_text_tokens, crc))
        self._tar.write({"__key__": sample.key, **sample.parts})

    def drop(self) -> None:
        """Gives the shard up and removes the temporary file."""
        with contextlib.suppress(OSError):  # closing writes, and the disk may be full
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def close(
        self, source: str, rejected: Rejections, num_read: int | None = None, cut: Cut | None = None
    ) -> ShardEntry | None:
        """Makes the shard final. Returns its entry; None: it has no samples, and only a side file is written.

        The side file is written last, and a replaced shard's side file is removed first, so that a kill in between
        leaves an unfinished shard.
        """
        entry = None
        if self._records:
            try:
                entry = self._publish()
            except BaseException:
                self.drop()
                raise
        else:
            self.drop()
            self.path.unlink(missing_ok=True)
        num_read = self.num_samples + len(rejected) if num_read is None else num_read
        write_progress(self.path, ShardProgress(FORMAT_VERSION, source, entry, rejected, num_read, cut))
        return entry

    def _publish(self) -> ShardEntry:
        """Reads the tar back, then moves it and its index to their final names."""
        records = np.zeros(len(self._records), RECORD)
        for column, name in enumerate(
            ("key_hash", "part_bytes", "num_image_tokens", "num_text_tokens", "crc32")
        ):
            records[name] = [record[column] for record in self._records]
        records["header_blocks"] = records["part_bytes"] > 0  # USTAR: one header each
        ends = np.cumsum(extents(records))
        records["offset"][1:] = ends[:-1]
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _rescan(self._temporary, records)
        # An old side file would fit the new tar: tars are padded to 10 KiB, so their sizes may agree.
        side = self.path.with_name(progress_name(self.path.name))
        if side.exists():
            side.unlink()
            files.fsync_directory(side.parent)  # a crash must not keep it beside the new tar
        self._temporary.replace(self.path)
        return write_index(self.path, records)


def write_index(path: Path, records: Records) -> ShardEntry:
    """Writes the index of the tar at `path`, and returns the shard's entry."""
    buffer = io.BytesIO()
    np.save(buffer, records)
    content = buffer.getvalue()
    files.write_bytes(path.with_name(index_name(path.name)), content)
    return ShardEntry(
        name=path.name,
        num_bytes=path.stat().st_size,
        num_samples=len(records),
        sha256=files.sha256(path),
        index_sha256=hashlib.sha256(content).hexdigest(),  # as it was meant, not as the disk gives it back
    )


def write_progress(path: Path, progress: ShardProgress) -> None:
    """Writes the side file of the tar at `path`, which marks the shard as finished."""
    tree = dataclasses.asdict(progress)
    if progress.cut is None:
        del tree["cut"]  # as earlier versions wrote it
    files.write_json(path.with_name(progress_name(path.name)), tree)


def _check(sample: Sample, keys: set[str]) -> None:
    if not KEY_PATTERN.fullmatch(sample.key):
        raise UserError(
            f"key '{sample.key}': use 1 to 64 of A-Z a-z 0-9 _ -, starting with a letter or digit"
        )
    if sample.key in keys:
        raise UserError(f"key '{sample.key}': used twice; make keys unique")
    if not 1 <= len(sample.parts) <= MAX_PARTS:
        raise UserError(f"sample '{sample.key}': {len(sample.parts)} parts; write 1 to {MAX_PARTS}")
    for part, payload in sample.parts.items():
        if not PART_PATTERN.fullmatch(part):
            raise UserError(
                f"sample '{sample.key}': part name '{part}'; use up to 32 of a-z 0-9 _ joined by dots"
            )
        if not 1 <= len(payload) <= MAX_PART_BYTES:
            raise UserError(
                f"sample '{sample.key}': part '{part}' has {len(payload)} bytes; reject the sample instead"
            )


def _rescan(path: Path, records: Records) -> None:
    """Compares the tar, read with the standard library's reader, with its index records. Raises UserError."""
    try:
        with tarfile.open(path, "r:") as tar:
            damaged = _damaged(tar, records)
    except tarfile.TarError:  # the first header
        damaged = "the tar"
    if damaged:
        raise UserError(f"{path}: {damaged} does not read back as written; check the disk, run again")


def _damaged(tar: tarfile.TarFile, records: Records) -> str:
    """The first part of the tar that differs from its records, in words; "": none does."""
    members = tar.getmembers()
    if len(members) != np.count_nonzero(records["part_bytes"]):  # a reader ends at a damaged header
        return f"the tar after {len(members)} parts"
    position = 0
    for record, end in zip(records, records["offset"].astype(np.int64) + extents(records), strict=True):
        parts: dict[str, bytes] = {}
        for num_bytes in record["part_bytes"][record["part_bytes"] > 0]:
            member = members[position]
            content = tar.extractfile(member)
            assert content is not None
            key, _, part = member.name.partition(".")
            parts[part] = content.read()
            assert len(parts[part]) == num_bytes
            position += 1
        assert member.offset_data + -(-member.size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES == end
        if sample_crc32(key, parts) != record["crc32"]:
            return f"sample '{key}'"
    return ""
