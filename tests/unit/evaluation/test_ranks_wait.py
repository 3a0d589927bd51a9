"""The first rank finishes a shared work (scores, a manifest) only when every rank has done its share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from base.team import Team
from data.image_set import ImageSet, Item, write_image, write_manifest
from evaluation.runner import Measurement, evaluate
from generator import draw_on_ranks
from tokenizer import encode

WORLD = 3
LATE_S = 0.15
Note = Callable[[str], None]


class LateSuite:
    """Rank r needs r times LATE_S for its share."""

    name = "late"
    roles = ("result",)
    protocol: Mapping[str, Any] = {}
    fingerprints: Mapping[str, str] = {}

    def __init__(self, note: Note) -> None:
        self._note = note

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        time.sleep(LATE_S * rank)
        self._note("share")

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        self._note("finish")
        return [Measurement({"level": 1.0}) for _ in items]


class LateJob:
    """In the place of what encodes shards."""

    shards = tuple(SimpleNamespace(name=f"shard-{number}", num_samples=1) for number in range(WORLD))
    dataset = SimpleNamespace(manifest=SimpleNamespace(shards=shards))

    def __init__(self, config: Any) -> None:
        self.out, self._late_s, self._note = config.out, config.late_s, config.note

    def is_finished(self, name: str) -> bool:
        return False

    def write(self, name: str, numbers: range) -> Callable[[], None]:
        time.sleep(self._late_s)
        return lambda: self._note("share")

    def finish(self, names: list[str]) -> None:
        assert names == [shard.name for shard in self.shards]
        self._note("finish")


def evaluates(folder: Path, ranks: Any, note: Note) -> object:
    return evaluate(LateSuite(note), folder / "images", folder / "scores", team=team_of(ranks))


def draws(folder: Path, ranks: Any, note: Note) -> object:
    return draw_on_ranks.draw_on_ranks(
        [SimpleNamespace(name=str(number), is_done=lambda out: False) for number in range(WORLD)],
        folder / "drawn",
        block_images=1,
        drawn_with={},
        start=lambda: lambda block: time.sleep(LATE_S * ranks.rank),
        write=lambda block, drawn: note("share"),
        item=lambda one: Item(one.name, {"result": f"{one.name}.png"}, {}),
        team=team_of(ranks),
    )


def encodes(folder: Path, ranks: Any, note: Note) -> object:
    config: Any = SimpleNamespace(out=folder / "encoded", late_s=LATE_S * ranks.rank, note=note)
    return encode.encode_shards(config, rank=ranks.rank, world=ranks.world, barrier=ranks.barrier)


def team_of(ranks: Any) -> Team:
    return Team(ranks.rank, ranks.world, ranks.barrier, ranks.gather)


@pytest.mark.parametrize("work", [evaluates, draws, encodes])
def test_the_first_rank_finishes_after_the_last_share(
    together: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Path, Any, Note], object],
) -> None:
    notes: list[str] = []
    for number in range(WORLD):
        write_image(tmp_path / "images" / f"{number}.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    items = [Item(str(number), {"result": f"{number}.png"}, {}) for number in range(WORLD)]
    write_manifest(tmp_path / "images", items)
    monkeypatch.setattr(draw_on_ranks, "write_manifest", lambda out, items: notes.append("finish"))
    monkeypatch.setattr(encode, "_Job", LateJob)
    monkeypatch.setattr(encode, "check_out", lambda config: None)
    monkeypatch.setattr(encode, "claim_shards", lambda out, command: None)
    results = together(WORLD, lambda ranks: work(tmp_path, ranks, notes.append))
    assert notes == ["share"] * WORLD + ["finish"], "once, by one rank, at the end"
    if work is evaluates:
        assert results[0]["n"] == WORLD and results[1:] == [{}, {}]
