"""Sharding by two processes that is killed at random moments leaves, in the end, the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data.shards import Sample, verify
from data.sources.base import BadItemError, InUnits
from data.sources.prepare import Preparation
from data.sources.write import Workers, write_sources
from quickstart.pictures.config import EmojiConfig
from quickstart.pictures.source import EmojiSource

NUM_ITEMS, ITEMS_PER_SHARD = 400, 20


class Scenes:
    """Emoji scenes; each tenth is bad, and each tenth is the one before it under another key."""

    description = "scenes with faults"

    def __init__(self) -> None:
        self._scenes = EmojiSource(EmojiConfig(), "scenes-train", NUM_ITEMS)

    def __len__(self) -> int:
        return NUM_ITEMS

    def sample(self, index: int) -> Sample:
        if index % 10 == 3:
            raise BadItemError(f"bad-{index}", "third: the test leaves it out")
        if index % 10 == 7:
            return dataclasses.replace(self._scenes.sample(index - 1), key=f"copy-{index}")
        return self._scenes.sample(index)


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate_bits", [None, 0])
def test_twenty_kills_leave_the_bytes_of_an_undisturbed_sharder(  # type: ignore[no-untyped-def]
    assert_kills_change_nothing, tmp_path: Path, deduplicate_bits: int | None
) -> None:
    source = InUnits(Scenes(), ITEMS_PER_SHARD)

    def write(out: Path) -> None:
        ledger = write_sources(
            {out: source},
            Workers(num_processes=2),
            prepare=Preparation(resolution=48, encoding="png"),
            deduplicate_bits=deduplicate_bits,
        )[out]
        assert ledger.num_read == NUM_ITEMS == ledger.num_written + ledger.num_rejected
        reasons = dict(ledger.reasons)
        assert reasons["third"] == NUM_ITEMS // 10
        assert deduplicate_bits is None or reasons["duplicate"] >= NUM_ITEMS // 10

    assert_kills_change_nothing(write)
    assert verify(tmp_path / "killed-0") == []
