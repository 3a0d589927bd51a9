"""Shared by all sources of samples: their interface and bad items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from base.config import UserError
from data.shards import Sample


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
