"""The indices of a data set's shards, memory-mapped while they are looked at (contract 1)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from data.shard_index import RECORD, Records
from engine.config import UserError

MAX_OPEN_INDICES = (
    64  # a mapping holds a file descriptor; a process commonly has 1,024, and may read several sets
)
PREFIX_BYTES = 10  # of an .npy file: magic, version, length of the header
MAX_HEAD_BYTES = 4096
CONTINUE = "run the writer again (make_shards or encode_latents), it continues there"


class IndexFiles(Sequence[Records]):
    """Records of each shard. Only those used last are mapped: the memory of all others is given back."""

    def __init__(self, indices: Sequence[Path | Records]) -> None:
        """`indices` were checked (`load_index`); files among them do not change any more."""
        self._indices = indices
        self._open = functools.lru_cache(maxsize=MAX_OPEN_INDICES)(self._load)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, shard: int) -> Records: ...

    @overload
    def __getitem__(self, shard: slice) -> list[Records]: ...

    def __getitem__(self, shard: int | slice) -> Records | list[Records]:
        if isinstance(shard, slice):
            return [self[number] for number in range(*shard.indices(len(self)))]
        return self._open(shard)

    def __iter__(self) -> Iterator[Records]:
        return map(self._load, range(len(self)))  # one at a time

    def _load(self, shard: int) -> Records:
        index = self._indices[shard]
        return _map(index) if isinstance(index, Path) else index


def load_index(file: Path | bytes, num_samples: int, where: object) -> Records:
    """One index, memory-mapped if it is a file. Raises UserError, naming `where`: not an index of that many samples."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            head = stream.read(MAX_HEAD_BYTES)
        num_bytes = file.stat().st_size
    else:
        head, num_bytes = file[:MAX_HEAD_BYTES], len(file)
    offset = _data_offset(head)
    header = head[PREFIX_BYTES:offset].decode("latin-1").strip()
    expected = f"{{'descr': {RECORD.descr!r}, 'fortran_order': False, 'shape': ({num_samples},), }}"
    if header != expected or num_bytes != offset + num_samples * RECORD.itemsize:
        raise UserError(f"{where}: not {num_samples} records of this format; {CONTINUE}")
    return _map(file) if isinstance(file, Path) else np.frombuffer(file, RECORD, offset=offset)


def _map(path: Path) -> Records:
    with path.open("rb") as file:
        offset = _data_offset(file.read(PREFIX_BYTES))
    index = np.memmap(path, RECORD, mode="r", offset=offset)
    return index.view(np.ndarray)  # np.memmap's slicing is slow


def _data_offset(head: bytes) -> int:
    """Where the records begin in an .npy file of version 1.0; 0 if it is none.

    numpy parses the header with `ast`, which fails now and then when two threads do it (Python 3.11). Ours is known.
    """
    is_ours = head[:8] == b"\x93NUMPY\x01\x00" and len(head) >= PREFIX_BYTES
    return PREFIX_BYTES + int.from_bytes(head[8:PREFIX_BYTES], "little") if is_ours else 0
