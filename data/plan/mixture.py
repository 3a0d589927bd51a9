"""One or several weighted data sets as one address space, without quarantined samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from base import files
from base.config import UserError
from data.config import SetConfig, StorageConfig
from data.shards import Sample, ShardDataset
from data.shards.index import key_hash
from data.shards.quarantine import read_quarantine


@dataclass(frozen=True)
class Member:
    """One opened data set of a mixture."""

    name: str
    dataset: ShardDataset
    weight: float = 1.0
    kept: npt.NDArray[np.int64] | None = None  # numbers of the samples not quarantined, ascending; None: all
    fingerprint: str = ""  # of the samples in order; keys the plan's permutations

    def __len__(self) -> int:
        """Number of samples that are not quarantined."""
        return len(self.dataset) if self.kept is None else len(self.kept)

    def select(self, column: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The rows of a per-sample column whose samples are not quarantined."""
        return column if self.kept is None else column[self.kept]


class Mixture:
    """Data sets as one sequence: addresses 0 .. len - 1 number the members' samples, member after member."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.first = np.cumsum([0, *(len(member) for member in members)])
        (only,) = self.members if len(self.members) == 1 else (None,)
        self.fingerprint = (
            only.fingerprint
            if only is not None
            else files.digest([[member.fingerprint, member.weight] for member in self.members])
        )

    @staticmethod
    def of(dataset: ShardDataset) -> Mixture:
        """A mixture of one whole data set."""
        return Mixture([Member("", dataset, fingerprint=dataset.fingerprint)])

    @staticmethod
    def open(sets: dict[str, SetConfig], storage: StorageConfig | None = None) -> Mixture:
        """Opens every set.

        Raises UserError: as ShardDataset.open; a quarantine file names samples that its set does not have.
        """
        return Mixture([_open(name, config, storage) for name, config in sets.items()])

    def __len__(self) -> int:
        return int(self.first[-1])

    @functools.cached_property
    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [len]: first 8 bytes of SHA-256 of each key."""
        columns = [member.select(member.dataset.key_hashes) for member in self.members]
        return np.concatenate(columns).astype(np.uint64, copy=False)

    @property
    def where(self) -> str:
        """The members' folders, for messages."""
        return ", ".join(str(member.dataset.directory) for member in self.members)

    def read(self, addresses: npt.NDArray[np.int64]) -> list[Sample]:
        """The samples at `addresses`, in that order. Raises UserError as ShardDataset.read."""
        samples: dict[int, Sample] = {}
        for number, member in enumerate(self.members):
            mine = addresses[(addresses >= self.first[number]) & (addresses < self.first[number + 1])]
            if len(mine):
                read = member.dataset.read(self._in_dataset(number, mine))
                samples.update(zip(mine.tolist(), read, strict=True))
        return [samples[address] for address in addresses.tolist()]

    def will_need(self, number: int, indices: npt.NDArray[np.int64]) -> None:
        """Announces that samples `indices` of member `number` will be read soon."""
        self.members[number].dataset.will_need(self._in_dataset(number, indices + self.first[number]))

    def _in_dataset(self, number: int, addresses: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        indices = np.asarray(addresses - self.first[number], np.int64)
        kept = self.members[number].kept
        return indices if kept is None else kept[indices]


def _open(name: str, config: SetConfig, storage: StorageConfig | None) -> Member:
    if config.quarantine is None:
        dataset = ShardDataset.open(config.shards, storage)
        return Member(name, dataset, config.weight, fingerprint=dataset.fingerprint)
    quarantine = read_quarantine(Path(config.quarantine))
    dataset = ShardDataset.open(config.shards, storage, leave_out=quarantine.shards)
    hashes = np.array([key_hash(key) for key in sorted(quarantine.keys)], np.uint64)
    unknown = ~np.isin(hashes, dataset.key_hashes)
    if unknown.any() and not quarantine.shards:
        key = sorted(quarantine.keys)[int(np.argmax(unknown))]
        raise UserError(
            f"{config.quarantine}: {unknown.sum()} samples are not in {config.shards}, the first is '{key}'; "
            "give the file that was made for this data set"
        )
    kept = np.flatnonzero(~np.isin(dataset.key_hashes, hashes))
    fingerprint = files.digest([dataset.fingerprint, sorted(quarantine.shards), hashes.tolist()])
    return Member(name, dataset, config.weight, kept, fingerprint)
