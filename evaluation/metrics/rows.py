"""Feature vectors read in blocks, so that no metric needs all vectors in memory.

Shapes: N vectors, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

BLOCK_ROWS = 2048


class Rows(Protocol):
    """N vectors in memory or on disk."""

    def __len__(self) -> int:
        """N, the number of vectors."""

    def read(self, start: int, stop: int) -> Tensor:
        """float32 [min(stop, N) - start, D]."""

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        """float32 [len(indices), D]."""


def blocks(rows: Rows, count: int = BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
    """Yields (first index, vectors) of all rows in order."""
    for start in range(0, len(rows), count):
        yield start, rows.read(start, start + count)
