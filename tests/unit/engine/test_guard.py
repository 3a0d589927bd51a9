"""Where the guard's limits begin: exactly at their number, on every rank, and after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.config import UserError
from engine import deepspeed_engine, guard
from engine.engine_config import EngineConfig
from engine.guard import FEWEST_LOSSES, NUM_LOSSES, Guard
from engine.schedule import OptimizerConfig

RANKS = SimpleNamespace(rank=0, world=1)


def make(run_dir: Path, ranks: Any = RANKS, alarms: Any = (), **config: Any) -> Guard:
    objective = SimpleNamespace(alarms=lambda history: alarms)
    settings_ = EngineConfig(100, OptimizerConfig(lr=1.0), **config)
    return Guard(objective, settings_, run_dir, ranks, lambda *_: None)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=FEWEST_LOSSES - 2, max_size=NUM_LOSSES + 15))
def test_a_spike_is_above_the_factor_times_the_median_of_the_last_losses(losses: list[int]) -> None:
    watching = make(Path(), loss_spike_factor=3.0)
    known: list[int] = []
    for loss in losses:
        recent = sorted(known[-NUM_LOSSES:])
        middle = len(recent) // 2
        median = (recent[middle] + recent[~middle]) / 2 if recent else math.nan
        is_spike = len(recent) >= FEWEST_LOSSES and loss > 3 * median
        assert watching.is_spike(float(loss)) == is_spike
        if not is_spike:
            known.append(loss)


def test_a_loss_at_the_limit_is_none_and_one_above_it_is() -> None:
    for number, loss, expected in (
        (FEWEST_LOSSES, 6.0, False),
        (FEWEST_LOSSES, math.nextafter(6.0, 7.0), True),
        (FEWEST_LOSSES - 1, 100.0, False),
        (FEWEST_LOSSES, math.inf, True),
        (FEWEST_LOSSES, math.nan, False),
    ):
        watching = make(Path(), loss_spike_factor=3.0)
        assert not any(watching.is_spike(2.0) for _ in range(number))
        assert watching.is_spike(loss) == expected
        assert all(value == value for value in watching.state_dict()["losses"]), (
            "NaN is no loss to compare with"
        )


def batches() -> list[Any]:
    return [SimpleNamespace(number=1)]


def test_the_last_nonfinite_step_allowed_is_the_one_before_the_limit(tmp_path: Path) -> None:
    for on_alarm in ("warn", "stop", "roll_back"):
        watching = make(tmp_path, max_nonfinite_steps=3, on_alarm=on_alarm)
        for step in (4, 9):
            watching.nonfinite(step, batches())
            assert watching.alarm == ""
        if on_alarm == "roll_back":
            watching.nonfinite(11, batches())
            assert watching.alarm == "3 steps with a non-finite loss or gradient"
        else:
            with pytest.raises(UserError, match=r"3 steps with a non-finite .* \(last: 11\)"):
                watching.nonfinite(11, batches())
    assert len(list((tmp_path / "nonfinite").iterdir())) == 3


def test_spikes_end_the_run_only_when_they_come_in_a_row(tmp_path: Path) -> None:
    watching = make(tmp_path, max_nonfinite_steps=2, on_loss_spike="skip")
    for _ in range(FEWEST_LOSSES):
        watching.is_spike(1.0)
    watching.spike(20, 9.0, batches())
    assert not watching.is_spike(1.0)
    watching.spike(22, 9.0, batches())
    resumed = make(tmp_path, max_nonfinite_steps=2, on_loss_spike="skip")
    resumed.load_state_dict(watching.state_dict())
    assert resumed.is_spike(9.0), "the last losses are part of the checkpoint"
    with pytest.raises(UserError, match="2 loss spikes in a row"):
        resumed.spike(23, 9.0, batches())


def test_as_many_roll_backs_as_allowed_and_no_more(tmp_path: Path) -> None:
    watching = make(tmp_path, alarms=["it grew"], on_alarm="roll_back", max_roll_backs=2)
    for number in (1, 2):
        watching.is_spike(1.0)
        watching.nonfinite(5, batches())
        watching.look(5, {"loss": 1.0})
        assert watching.alarm == "it grew"
        assert watching.begin_roll_back(5, has_checkpoint=True) == "it grew"
        assert watching.alarm == "" and watching.nonfinite_steps == 0
        assert watching.state_dict() == {
            "nonfinite_steps": 0,
            "roll_backs": number,
            "spikes_in_a_row": 0,
            "losses": [],
        }
    resumed = make(tmp_path, alarms=["it grew"], on_alarm="roll_back", max_roll_backs=2)
    resumed.load_state_dict(watching.state_dict())
    for watcher in (watching, resumed):
        watcher.look(6, {"loss": 1.0})
        with pytest.raises(UserError, match="it grew, and 2 roll-backs did not help"):
            watcher.begin_roll_back(6, has_checkpoint=True)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        make(tmp_path).begin_roll_back(6, has_checkpoint=False)
    # Another batch of step 5 after a roll-back must not replace the first one.
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2


def test_an_alarm_warns_stops_or_rolls_back(tmp_path: Path) -> None:
    for on_alarm, alarm in (("warn", ""), ("roll_back", "first")):
        watching = make(tmp_path, alarms=["first", "second"], on_alarm=on_alarm)
        watching.look(3, {})
        assert watching.alarm == alarm
    with pytest.raises(UserError, match=r"stopped at step 3 by an alarm \(first\)"):
        make(tmp_path, alarms=["first", "second"], on_alarm="stop").look(3, {})


def test_every_rank_names_every_rank_that_differs_in_any_engine(
    together: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guard.deepspeed_engine, "checksum", lambda module: module)
    assert guard.deepspeed_engine is deepspeed_engine

    def check(ranks: Any, of_main: list[int], of_adversary: list[int], stage: int = 1) -> str:
        engines = {
            "main": SimpleNamespace(module=of_main[ranks.rank]),
            "adversary": SimpleNamespace(module=of_adversary[ranks.rank]),
        }
        try:
            make(tmp_path, ranks, zero_stage=stage).check_replicas(7, engines)
        except UserError as error:
            return str(error).partition(";")[0]
        return ""

    for of_main, of_adversary, stage, expected in (
        ([4, 4, 4], [5, 5, 5], 1, ""),
        ([4, 4, 3], [5, 5, 5], 1, "step 7: the main weights of ranks [2] differ from rank 0's"),
        ([4, 3, 3], [5, 5, 5], 2, "step 7: the main weights of ranks [1, 2] differ from rank 0's"),
        ([4, 4, 4], [5, 6, 5], 1, "step 7: the adversary weights of ranks [1] differ from rank 0's"),
        ([4, 3, 2], [5, 5, 5], 3, ""),
    ):
        found = together(3, lambda ranks, a=of_main, b=of_adversary, s=stage: check(ranks, a, b, s))
        assert found == [expected] * 3
