"""What every source of samples shares: what it is, and reproducible draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from data.shards import Sample
from engine.config import UserError

T = TypeVar("T")


class BadItemError(UserError):
    """One item of a source that cannot become a sample; `key` names it in rejected.jsonl."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Source(Protocol):
    """Items in a fixed order; the same source gives the same bytes."""

    @property
    def description(self) -> str:
        """What this is, with licence and a digest of what it was made from; kept in the manifest."""

    def __len__(self) -> int:
        """Number of items, good and bad."""

    def sample(self, index: int) -> Sample:
        """Item `index`. Raises BadItemError."""


class Draws:
    """Choices about one item: a pure function of (seed, stream name, index).

    Made from Philox's raw 64-bit words, which numpy keeps stable, unlike the streams of its Generator.
    """

    def __init__(self, seed: int, stream: str, index: int) -> None:
        words = np.array([seed, stable_hash(stream)], np.uint64)
        self._bits = np.random.Philox(key=words, counter=np.array([0, index, 0, 0], np.uint64))

    def below(self, limit: int) -> int:
        """Uniform in [0, limit)."""
        return int(self._bits.random_raw()) * limit >> 64

    def between(self, low: int, high: int) -> int:
        """Uniform in [low, high], both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases."""
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def pick(self, items: Sequence[T], number: int) -> list[T]:
        """`number` different ones of `items`, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(number)]


def stable_hash(text: str) -> int:
    """64 bits of SHA-256: the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
