"""Random choices about items and orders of them, determined by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.shards import Sample
from data.shards.index import key_hash
from data.sources.base import IndexedItems

T = TypeVar("T")


class Draws:
    """Random choices about one item, determined by (seed, stream name, index).

    They come from Philox's raw 64-bit words, which numpy keeps stable, unlike the streams of its Generator.
    """

    def __init__(self, seed: int, stream: str, index: int) -> None:
        """Raises UserError: a seed below 0 or above 64 bits."""
        counter = np.array([0, index, 0, 0], np.uint64)
        self._bits = np.random.Philox(key=philox_key(seed, stream), counter=counter)

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
        """`number` different elements of `items`, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(number)]


def philox_key(seed: int, stream: str) -> npt.NDArray[np.uint64]:
    """Philox's key for the draws named `stream`, uint64 [2]. Raises UserError: a seed below 0 or above 64 bits."""
    if not 0 <= seed < 1 << 64:
        raise UserError(f"seed {seed}: give a whole number from 0 to 2^64 - 1")
    return np.array([seed, key_hash(stream)], np.uint64)


class Shuffled:
    """The items of `indexed` in a random order, which (number of items, seed) determines. Implements IndexedItems.

    The order comes from Philox's raw words and a stable sort, which do not change between numpy versions.
    """

    def __init__(self, indexed: IndexedItems, seed: int) -> None:
        """Raises UserError: a seed below 0 or above 64 bits."""
        self._indexed = indexed
        key = philox_key(seed, "order of a source")
        self._order = np.argsort(np.random.Philox(key=key).random_raw(len(indexed)), kind="stable")
        self.description = f"{indexed.description}; in random order, seed {seed}"

    def __len__(self) -> int:
        """Number of items, good and bad."""
        return len(self._order)

    def sample(self, index: int) -> Sample:
        """The item at position `index` of the new order. Raises BadItemError."""
        return self._indexed.sample(int(self._order[index]))
