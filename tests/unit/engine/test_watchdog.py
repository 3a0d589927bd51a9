"""Whom the watchdog names, from what the ranks told."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import watchdog
from engine.spans import Place
from engine.watchdog import Beat, Watchdog, late_s, verdict

TIMEOUT_S = 80.0


def beat(
    rank: int, step: int = 7, part: str = "waiting", num_entered: int = 5, told_s: float = 1000.0
) -> Beat:
    return Beat(rank, f"host{rank // 2}", step, part, num_entered, 90.0, told_s)


def test_the_rank_that_is_behind_is_named() -> None:
    beats = [beat(0), beat(1), beat(2, part="data", num_entered=1), beat(3)]
    message, guilty = verdict(beats, TIMEOUT_S)
    assert message == "rank 2 on host1 has not moved for 1m30s: at step 7, in data" and guilty == {2}


def test_a_rank_of_an_earlier_step_is_behind_whatever_it_entered() -> None:
    beats = [beat(0, step=8, part="waiting", num_entered=1), beat(1, step=7, part="", num_entered=30)]
    message, guilty = verdict(beats, TIMEOUT_S)
    assert guilty == {1} and "at step 7, between two parts of it" in message


def test_a_silent_rank_is_named_before_one_that_is_behind() -> None:
    for silent in (None, beat(3, told_s=1000.0 - TIMEOUT_S)):
        beats = [beat(0), beat(1), beat(2, num_entered=1), silent]
        message, guilty = verdict(beats, TIMEOUT_S)
        assert message.startswith("no sign of life of rank 3") and guilty == {3}


def test_where_all_stand_at_the_same_place_nobody_is_named() -> None:
    message, guilty = verdict([beat(rank, part="communication") for rank in range(4)], TIMEOUT_S)
    assert message == "no rank has moved for 1m30s: all are at step 7, in communication" and guilty == set()


def test_a_rank_alone_is_named() -> None:
    message, guilty = verdict([beat(0, part="data")], TIMEOUT_S)
    assert guilty == {0} and message.startswith("rank 0 on host0 has not moved")


class StoppedStore:
    """A client's view of a first rank that was stopped: what is sent goes out, and no answer comes."""

    def set(self, _key: str, _value: str) -> None:
        pass

    def check(self, _keys: list[str]) -> bool:
        threading.Event().wait()
        raise AssertionError


class GoneStore(StoppedStore):
    def check(self, _keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("store", [StoppedStore(), GoneStore()])
@pytest.mark.parametrize("rank", [1, 2])
def test_every_rank_names_the_first_one_that_does_not_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    store: StoppedStore,
    rank: int,
) -> None:
    statuses, has_ended = [], threading.Event()
    monkeypatch.setattr(watchdog, "open_store", lambda *_, **__: store)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), has_ended.set()))
    ranks = SimpleNamespace(rank=rank, world=3, is_first=False, gather=lambda own: [(1, "node-a"), own, own])
    dog = Watchdog(ranks, 0.2, lambda: (7, Place("waiting", 3)), tmp_path)  # type: ignore[arg-type]
    try:
        assert has_ended.wait(late_s(0.2) + 2.0)
    finally:
        dog.close()
    line = capsys.readouterr().err.splitlines()[0]
    assert (
        line.startswith("error: no sign of life of rank 0 on node-a; the others wait; ") and statuses[0] == 76
    )
    assert "test_watchdog" in (tmp_path / "hang" / f"rank_{rank:05d}.txt").read_text()
