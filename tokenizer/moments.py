"""Per-channel mean and standard deviation, gathered batch by batch and merged in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class Moments:
    """Count, mean and sum of squared deviations per channel, in fp64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self, num_channels: int) -> None:
        self.count = 0
        self.mean: Vector = np.zeros(num_channels)
        self.squares: Vector = np.zeros(num_channels)

    @property
    def std(self) -> Vector:
        """Standard deviation over all values seen (divided by the count)."""
        assert self.count > 0
        return np.sqrt(self.squares / self.count)

    def add(self, values_BCYX: npt.NDArray[np.float64]) -> None:
        """Takes a batch [B, C, Y, X]."""
        other = Moments(len(self.mean))
        other.count = values_BCYX.size // len(self.mean)
        other.mean = values_BCYX.mean(axis=(0, 2, 3))
        other.squares = np.square(values_BCYX - other.mean[:, None, None]).sum(axis=(0, 2, 3))
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Adds the values that `other` has seen."""
        count = self.count + other.count
        if count == 0:
            return
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / count)
        self.squares = self.squares + other.squares + np.square(delta) * (self.count * other.count / count)
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values; JSON keeps every bit of a double."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Moments:
        """Rebuilds the Moments that gave `state`."""
        moments = cls(len(state["mean"]))
        moments.count = int(state["count"])
        moments.mean = np.array(state["mean"], np.float64)
        moments.squares = np.array(state["squares"], np.float64)
        return moments
