"""Stores a row of numbers for each image: an append-only file a shard, resumable, spread over ranks, read in blocks.

Images go through the network in blocks of IMAGES_PER_CALL that never depend on ranks or interruptions, because
another batch may round differently. A killed run leaves whole blocks and at most one torn block, which is dropped.
Hence the files, and every score, are the same bytes on any number of ranks and after any number of kills.

DIR/DIGEST/about.json       network, images, sizes
DIR/DIGEST/00000.f32        float32 rows of images 0 to SHARD_IMAGES - 1, little-endian; .f64: float64

Shapes: N images, D features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from base import files
from base.config import UserError
from base.progress import ProgressLine
from evaluation.features.interface import IMAGES_PER_CALL, RowFunction
from evaluation.image_source import Source

SHARD_IMAGES = 32 * IMAGES_PER_CALL
READ_IMAGES = 1024  # rows of a block when files are read back

BlockT = TypeVar("BlockT")


class RowFiles(Generic[BlockT]):
    """Rows of one source, computed by one function; a subclass is FeatureFiles or ScoreFiles."""

    KIND: ClassVar[str]
    DTYPE: ClassVar[np.dtype[Any]]
    ALLOWS_NAN: ClassVar[bool]

    def __init__(self, directory: Path, function: RowFunction[BlockT], source: Source[BlockT]) -> None:
        """The rows lie below `directory`, in a folder named after function and images: no other rows share it."""
        self.fingerprint = function.fingerprint
        self.dim = function.dim
        self.count = len(source)
        about = {self.KIND: function.fingerprint, "images": source.digest, "n": self.count, "dim": self.dim}
        self._about = {**about, "shard_images": SHARD_IMAGES}
        self._directory = directory / files.digest(self._about)[:16]
        self._function, self._source = function, source

    def collect(self, rank: int = 0, world: int = 1) -> None:
        """Computes the missing rows of shards rank, rank + world, ... Raises UserError as the source does."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            files.write_json(self._directory / "about.json", self._about)
        shards = range(rank, -(-self.count // SHARD_IMAGES), world)
        todo = [shard for shard in shards if not self._is_whole(shard)]
        if not todo:
            return
        progress = ProgressLine(f"rank {rank}: {self._function.name} {self.KIND}", "images")
        done, total = 0, sum(self._num_rows(shard) for shard in todo)
        for shard in todo:
            for count in self._extend(shard):
                done += count
                progress.show(done, done / total)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start, D], float32 or float64 as stored."""
        return torch.from_numpy(self.take(range(start, min(stop, self.count))))

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """[len(indices), D], the rows of any images, in the order of `indices`. Raises UserError: not computed yet."""
        places = np.asarray(indices, np.int64)
        rows = np.empty((len(places), self.dim), self.DTYPE.newbyteorder("="))
        for shard in np.unique(places // SHARD_IMAGES):
            if not self._is_whole(int(shard)):
                raise UserError(
                    f"{self._path(int(shard))}: {self.KIND} are not complete; run the command again"
                )
            here = places // SHARD_IMAGES == shard
            stored = np.memmap(self._path(int(shard)), self.DTYPE, "r").reshape(-1, self.dim)
            rows[here] = stored[places[here] % SHARD_IMAGES]
        return rows

    def blocks(self, count: int = READ_IMAGES) -> Iterator[Tensor]:
        """All rows in order, in blocks of `count`."""
        for start in range(0, self.count, count):
            yield self.read(start, start + count)

    def _extend(self, shard: int) -> Iterator[int]:
        """Appends the missing blocks of a shard; yields the number of images of each."""
        path, first, size = self._path(shard), shard * SHARD_IMAGES, self._num_rows(shard)
        block_bytes = IMAGES_PER_CALL * self.dim * self.DTYPE.itemsize
        whole = path.stat().st_size // block_bytes if path.is_file() else 0
        with path.open("ab") as file:
            file.truncate(whole * block_bytes)
            yield min(whole * IMAGES_PER_CALL, size)
            for start in range(whole * IMAGES_PER_CALL, size, IMAGES_PER_CALL):
                stop = min(start + IMAGES_PER_CALL, size)
                values = self._function(self._source.read(first + start, first + stop))
                assert values.shape == (stop - start, self.dim)
                if bool((values.isinf() if self.ALLOWS_NAN else ~values.isfinite()).any()):
                    raise UserError(
                        f"{self._function.name}: {self.KIND} of images {first + start} to {first + stop - 1} are "
                        "not finite; look at the images and the network's weights"
                    )
                file.write(values.numpy().astype(self.DTYPE).tobytes())
                file.flush()
                os.fsync(file.fileno())
                yield stop - start

    def _num_rows(self, shard: int) -> int:
        return min(SHARD_IMAGES, self.count - shard * SHARD_IMAGES)

    def _is_whole(self, shard: int) -> bool:
        path = self._path(shard)
        expected = self._num_rows(shard) * self.dim * self.DTYPE.itemsize
        return path.is_file() and path.stat().st_size == expected

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:05d}.f{8 * self.DTYPE.itemsize}"


class FeatureFiles(RowFiles[Tensor]):
    """Feature vectors of a FeatureExtractor: float32, all finite."""

    KIND, DTYPE, ALLOWS_NAN = "features", np.dtype("<f4"), False


class ScoreFiles(RowFiles[BlockT]):
    """Scores of single images: float64; nan means that a score is not defined for the image."""

    KIND, DTYPE, ALLOWS_NAN = "scores", np.dtype("<f8"), True


@dataclass(frozen=True)
class FeatureRows:
    """Some columns of stored features, as metrics read them."""

    features: FeatureFiles
    begin: int
    end: int

    def __len__(self) -> int:
        return len(self.features)

    def read(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, end - begin]."""
        return self.features.read(start, stop)[:, self.begin : self.end]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """float32 [len(indices), end - begin]."""
        return torch.from_numpy(self.features.take(indices)[:, self.begin : self.end])
