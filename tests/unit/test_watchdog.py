"""Whom the watchdog names, from what the ranks told."""

from __future__ import annotations

from engine.watchdog import Beat, verdict

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
