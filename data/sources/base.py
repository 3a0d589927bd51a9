"""Shared by all sources of samples: their interface, bad items and reproducible random draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.shards import Sample
from data.shards.index import key_hash

T = TypeVar("T")


class BadItemError(UserError):
    """An item of a source cannot become a sample; `key` names it in rejected.jsonl.

    `reason` starts with its kind and a colon ("too small: 120x80 px, ..."): the ledger counts by kind.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadItemError], tuple[str, str]]:
        """Makes the error picklable, for other processes."""
        return BadItemError, (self.key, self.reason)


@dataclass(frozen=True)
class Unit:
    """A piece of a source that becomes one shard: a range of items, an input file, or a few row groups."""

    name: str  # for messages
    num_items: int | None = None  # None: unknown before the unit is read
    num_bytes: int = 0  # of the input; estimates the time left if num_items is unknown


class Source(Protocol):
    """Units in a fixed order, each with items in a fixed order. Equal sources give equal bytes."""

    @property
    def description(self) -> str:
        """The source in words for the manifest, with licence and a digest of its input."""

    @property
    def units(self) -> Sequence[Unit]:
        """Unit i becomes shard i; processes and nodes divide the units among themselves."""

    def items(self, unit: int) -> Iterator[Sample | BadItemError]:
        """Yields every item of a unit, good or bad: nothing is left out silently.

        Raises UserError: the input is so damaged that its items cannot be counted.
        """


class IndexedItems(Protocol):
    """A source with numbered items."""

    @property
    def description(self) -> str:
        """See Source."""

    def __len__(self) -> int:
        """Number of items, good and bad."""

    def sample(self, index: int) -> Sample:
        """Item `index`. Raises BadItemError: it cannot become a sample."""


class InUnits:
    """A Source of numbered items, in units of `max_samples_per_shard` neighbours."""

    def __init__(self, indexed: IndexedItems, max_samples_per_shard: int) -> None:
        """Raises UserError: less than one sample a shard."""
        if max_samples_per_shard < 1:
            raise UserError(f"max_samples_per_shard is {max_samples_per_shard}; give at least 1")
        self._indexed = indexed
        starts = range(0, len(indexed), max_samples_per_shard)
        self._ranges = [range(a, min(a + max_samples_per_shard, len(indexed))) for a in starts]
        self.description = f"{indexed.description}; {max_samples_per_shard} a shard"
        self.units = [Unit(f"items {items[0]} to {items[-1]}", len(items)) for items in self._ranges]

    def items(self, unit: int) -> Iterator[Sample | BadItemError]:
        """See Source."""
        for index in self._ranges[unit]:
            try:
                item: Sample | BadItemError = self._indexed.sample(index)
            except BadItemError as error:
                item = error
            yield item


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
