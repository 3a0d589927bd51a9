"""Reads the index files of a data set's shards on demand."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from base import limits
from base.config import UserError
from data.shards.block_cache import Descriptor
from data.shards.index import RECORD, Records
from data.shards.storage import retrying

MAX_OPEN_INDICES = 64  # each holds one of a process's descriptors, commonly 1,024, for several data sets
PREFIX_BYTES = 10  # start of an .npy file: magic, version, length of the header
MAX_HEAD_BYTES = 4096
BLOCK_RECORDS = 256  # read at once: 20 kB cost little more than one record
# A window of the plan is 32 runs of 64 neighbours (data/plan/plan.py): their blocks stay while its packs are read, and
# those of the next window and of a few other streams beside them. 5 MB.
MAX_BLOCKS = 256
# A record without its fields: with them, numpy copies one field after the other, and takes 50 times as long.
OPAQUE = np.dtype((np.void, RECORD.itemsize))
BLOCK_BITS = 32  # of a place: the shard's number before them, in them the block's
READ_ATTEMPTS = 3  # of local files; network file systems repeat by themselves
RETRY_WAIT_S = 0.5
CONTINUE = "run the writer again (make_shards or encode_latents), it continues there"


class IndexFiles:
    """The records of each shard. Uses `pread`: under mmap, truncating the file would kill the process (SIGBUS)."""

    def __init__(self, indices: Sequence[Path | Records], num_samples: Sequence[int]) -> None:
        """`indices`: files checked by `load_index`, or records; `num_samples`: number of records in each."""
        self._indices = indices
        self._num_samples = num_samples
        self._open = functools.lru_cache(maxsize=MAX_OPEN_INDICES)(self._opened)
        self._block = functools.lru_cache(maxsize=MAX_BLOCKS)(self._read)

    def __iter__(self) -> Iterator[Records]:
        """Yields all records of each shard in turn. Raises UserError: a file has changed."""
        for index, count in zip(self._indices, self._num_samples, strict=True):
            yield load_index(index, count, index) if isinstance(index, Path) else index

    def take(self, shards: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> Records:
        """The records at `rows` of `shards`, one or more, ascending together. Raises UserError: a file that was cut."""
        block, inside = rows // BLOCK_RECORDS, rows % BLOCK_RECORDS
        places = shards << BLOCK_BITS | block
        cuts = [0, *(np.flatnonzero(places[1:] != places[:-1]) + 1).tolist(), len(rows)]
        blocks = map(self._block, places[cuts[:-1]].tolist())
        pieces = [
            records[inside[a:b]] for records, (a, b) in zip(blocks, itertools.pairwise(cuts), strict=True)
        ]
        return np.concatenate(pieces).view(RECORD)

    def _read(self, place: int) -> npt.NDArray[np.void]:
        """The records of one block, each as bytes. Raises UserError: a file that was cut."""
        shard, first = place >> BLOCK_BITS, (place & (1 << BLOCK_BITS) - 1) * BLOCK_RECORDS
        last = min(first + BLOCK_RECORDS, self._num_samples[shard])
        path = self._indices[shard]
        if not isinstance(path, Path):
            return path[first:last].view(OPAQUE)
        num_bytes = (last - first) * RECORD.itemsize

        def action() -> bytes:
            try:
                descriptor, offset = self._open(shard)
                content = os.pread(descriptor.number, num_bytes, offset + first * RECORD.itemsize)
            except OSError:
                self._open.cache_clear()
                raise
            if len(content) < num_bytes:
                raise UserError(f"{path}: index was cut while it is read; {CONTINUE}")
            return content

        return np.frombuffer(retrying(action, str(path), READ_ATTEMPTS, RETRY_WAIT_S), OPAQUE)

    def _opened(self, shard: int) -> tuple[Descriptor, int]:
        """A shard's open index, and the byte at which its records begin."""
        descriptor = Descriptor(str(self._indices[shard]))
        return descriptor, _data_offset(os.pread(descriptor.number, PREFIX_BYTES, 0))


def read_index(path: Path, num_samples: int) -> bytes:
    """The bytes of an index of `num_samples` records. Raises UserError: it cannot be read, or is larger."""
    try:
        return limits.read_bytes(path, MAX_HEAD_BYTES + num_samples * RECORD.itemsize)
    except OSError as error:
        raise UserError(f"{path}: index cannot be read ({error.strerror}); {CONTINUE}") from None


def load_index(file: Path | bytes, num_samples: int, where: object) -> Records:
    """One index in memory. Raises UserError naming `where`: it is not an index of `num_samples` samples."""
    content = read_index(file, num_samples) if isinstance(file, Path) else file
    offset = _data_offset(content)
    header = content[PREFIX_BYTES:offset].decode("latin-1").strip()
    expected = f"{{'descr': {RECORD.descr!r}, 'fortran_order': False, 'shape': ({num_samples},), }}"
    if header != expected or len(content) != offset + num_samples * RECORD.itemsize:
        raise UserError(f"{where}: not {num_samples} records of this format; {CONTINUE}")
    return np.frombuffer(content, RECORD, offset=offset)


def _data_offset(head: bytes) -> int:
    """The byte at which the records begin in an .npy file of version 1.0; 0: it is not such a file.

    numpy would parse the header with `ast`, which sometimes fails in two threads at once (Python 3.11).
    """
    is_ours = head[:8] == b"\x93NUMPY\x01\x00" and len(head) >= PREFIX_BYTES
    return PREFIX_BYTES + int.from_bytes(head[8:PREFIX_BYTES], "little") if is_ours else 0
