"""Shuffles numbered items, so that every shard holds all classes."""

from __future__ import annotations

import numpy as np

from data.shards import Sample
from data.sources.base import IndexedItems, philox_key


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
