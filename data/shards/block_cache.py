"""A bounded cache of remote shards' blocks on a local disk, which the ranks of a node share.

CACHE/blocks/FINGERPRINT/SHARD/NUMBER holds one block. Processes coordinate through the file system alone: a rename
makes a block appear, any process may delete the oldest block, and a deleted block is fetched again. A block needs no
checksum, because every sample has one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from base import limits
from base.terminal import say
from data.shards.storage import replace_file

# Object stores reach full speed with far larger blocks, but the plan reads 64 neighbours at a time: with 33 kB a
# sample, blocks of 4 MiB would fetch three times the bytes that are used.
BLOCK_BYTES = 1 << 20
MAX_OPEN_BLOCKS = 128
# Each process counts its own writes and scans the folder after every 1/64 of the bound: eight ranks stay within it.
SCAN_SHARE = 64
KEEP_SHARE = 7 / 8
STALE_S = 3600.0  # a temporary file older than this belongs to no living writer


class BlockCache:
    """The cached blocks of one data set. Several threads and processes may use it."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        """`max_bytes`: the bound of all data sets in `folder` together."""
        self.max_bytes = max_bytes
        self._root = folder / "blocks"
        self._folder = self._root / fingerprint[:32]
        self._unscanned_bytes = max_bytes  # scan before the first write
        self._lock = threading.Lock()
        self._is_broken = False
        self._open = functools.lru_cache(maxsize=MAX_OPEN_BLOCKS)(self._open_block)

    @property
    def is_writable(self) -> bool:
        """Whether no write has failed yet: the disk has room and the folder is writable."""
        return not self._is_broken

    def __contains__(self, block: tuple[str, int]) -> bool:
        return self._path(block).is_file()

    def read(self, block: tuple[str, int], start: int, num_bytes: int) -> bytes | None:
        """`num_bytes` from `start` of block (shard, number); None: the block is missing or too short."""
        try:
            piece = os.pread(self._open(block).number, num_bytes, start)
        except OSError:
            return None
        if len(piece) < num_bytes:
            self.drop(block)
            return None
        return piece

    def write(self, block: tuple[str, int], payload: bytes) -> bool:
        """Stores a block. Returns False if this or an earlier write failed; only the first failure is printed."""
        with self._lock:
            if self._is_broken:
                return False
            try:
                self._make_room(len(payload))
                replace_file(self._path(block), payload)
            except OSError as error:
                self._is_broken = True
                say(
                    f"{self._root}: cannot cache shards ({error.strerror}); going on without, slower. "
                    "Make room or set storage.cache_dir and storage.cache_gib",
                    sys.stderr,
                )
        return not self._is_broken

    def drop(self, block: tuple[str, int]) -> None:
        """Deletes a block, if it is there."""
        with contextlib.suppress(OSError):
            self._path(block).unlink()
        self._open.cache_clear()

    def _path(self, block: tuple[str, int]) -> Path:
        shard, number = block
        return self._folder / shard / f"{number:06d}"

    def _open_block(self, block: tuple[str, int]) -> Descriptor:
        path = self._path(block)
        os.utime(path)  # marks the block as used just now
        return Descriptor(str(path))

    def _make_room(self, num_bytes: int) -> None:
        """Deletes the least recently used blocks, if `num_bytes` more would exceed the bound."""
        self._unscanned_bytes += num_bytes
        if self._unscanned_bytes < self.max_bytes / SCAN_SHARE:
            return
        self._unscanned_bytes = 0
        found = sorted(_scan(self._root))
        excess = sum(size for _, size, _ in found) + num_bytes - self.max_bytes * KEEP_SHARE
        for _, size, path in found:
            if excess <= 0:
                break
            with contextlib.suppress(OSError):  # another rank was faster
                Path(path).unlink()
            excess -= size


class Descriptor:
    """An open file, which closes when its last reader drops it: eviction cannot close it under a reader."""

    def __init__(self, path: str) -> None:
        self.number = limits.open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _scan(folder: str | Path) -> Iterator[tuple[float, int, str]]:
    """Yields (time of last use, bytes, path) of every block below `folder`; deletes stale temporary files."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        with contextlib.suppress(OSError):  # deleted meanwhile
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(entry.path)
                continue
            status = entry.stat(follow_symlinks=False)
            if not entry.name.endswith(".tmp"):
                yield status.st_mtime, status.st_size, entry.path
            elif time.time() - status.st_mtime > STALE_S:
                Path(entry.path).unlink()
