"""A bounded cache of blocks of remote shards on a local disk, shared by the ranks of a node (contract 1).

CACHE/blocks/FINGERPRINT/SHARD/NUMBER holds one block. Processes coordinate through the file system alone: a block
appears by a rename, anybody may delete the oldest, and a block that vanished is fetched again. Checksums are those of
the samples, so a block needs none of its own.
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

# Far below what object stores read at full speed, because the plan reads 64 neighbours here and 64 there: with 33 kB
# a sample, blocks of 4 MiB would fetch three times the bytes that are used.
BLOCK_BYTES = 1 << 20
MAX_OPEN_BLOCKS = 128
# Each process counts its own writes, and looks at the folder after every 1/64: eight ranks stay within the bound.
SCAN_SHARE = 64
KEEP_SHARE = 7 / 8
STALE_S = 3600.0  # a temporary file that old belongs to no living writer


class BlockCache:
    """Blocks of one data set. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        """`max_bytes` bounds all data sets in `folder` together."""
        self.max_bytes = max_bytes
        self._root = folder / "blocks"
        self._folder = self._root / fingerprint[:32]
        self._unscanned_bytes = max_bytes  # look before the first write
        self._lock = threading.Lock()
        self._is_broken = False
        self._open = functools.lru_cache(maxsize=MAX_OPEN_BLOCKS)(self._open_block)

    @property
    def is_writable(self) -> bool:
        """False once a write failed: the disk is full, or the folder cannot be written."""
        return not self._is_broken

    def __contains__(self, block: tuple[str, int]) -> bool:
        return self._path(block).is_file()

    def read(self, block: tuple[str, int], start: int, num_bytes: int) -> bytes | None:
        """These bytes of block (shard, number), or None when it is not there or too short."""
        try:
            piece = os.pread(self._open(block).number, num_bytes, start)
        except OSError:
            return None
        if len(piece) < num_bytes:
            self.drop(block)
            return None
        return piece

    def write(self, block: tuple[str, int], payload: bytes) -> bool:
        """Keeps `payload`. False: that failed, now or before; it is said once and not tried again."""
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
        """Deletes a block."""
        with contextlib.suppress(OSError):
            self._path(block).unlink()
        self._open.cache_clear()

    def _path(self, block: tuple[str, int]) -> Path:
        shard, number = block
        return self._folder / shard / f"{number:06d}"

    def _open_block(self, block: tuple[str, int]) -> Descriptor:
        path = self._path(block)
        os.utime(path)  # read just now: among the last to be deleted
        return Descriptor(str(path))

    def _make_room(self, num_bytes: int) -> None:
        """Deletes the blocks that were not opened for longest, once there are too many."""
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
    """An open file, closed when the last reader lets go of it; eviction cannot close it under a reader."""

    def __init__(self, path: str) -> None:
        self.number = limits.open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _scan(folder: str | Path) -> Iterator[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every block below `folder`; stale temporary files are deleted."""
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
