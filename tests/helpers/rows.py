"""Vectors in memory, for metrics that read blocks of rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class TensorRows:
    """Vectors in memory; implements evaluation.metrics.rows.Rows."""

    values: Tensor  # [N, D]

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
        return self.values[np.asarray(indices, np.int64)]
