"""The averaged weights, against the recursion written out in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import deepspeed_engine
from engine.averages import Averages
from engine.ema import Ema

DECAYS = (0.9, 0.5, 0.9999)


def engine_of(values: list[float]) -> SimpleNamespace:
    shards = [torch.tensor([value, -value, 1.0]) for value in values]
    return SimpleNamespace(optimizer=SimpleNamespace(fp32_partitioned_groups_flat=shards))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=12), st.integers(0, 100_000))
@example([2.0, -3.0, 4.0], 0)
@example([2.0, -3.0, 4.0], 80)
def test_each_average_follows_its_own_recursion(weights: list[float], first_step: int) -> None:
    """d = min(decay, (1 + step) / (10 + step)): 1/10 at the first step."""
    engine = engine_of([1.5, 0.25])
    ema = Ema(engine, DECAYS)
    assert tuple(ema.shadows) == DECAYS
    expected = {decay: [1.5, 0.25] for decay in DECAYS}
    for number, value in enumerate(weights):
        step = first_step + number
        now = [value, 2 * value]
        for shard, weight in zip(deepspeed_engine.shards(engine), now, strict=True):
            shard.copy_(torch.tensor([weight, -weight, 1.0]))
        ema.update(engine, step)
        for decay, average in expected.items():
            d = min(decay, (1 + step) / (10 + step))
            expected[decay] = [d * a + (1 - d) * weight for a, weight in zip(average, now, strict=True)]
    for decay, shadow in ema.shadows.items():
        for shard, value in zip(shadow, expected[decay], strict=True):
            assert shard.tolist() == pytest.approx([value, -value, 1.0], abs=1e-5)  # 12 fp32 roundings


@pytest.mark.parametrize(("asked", "used"), [(None, 0.9), (0.5, 0.5), (0.9999, 0.9999)])
def test_the_average_asked_for_takes_the_weights_place(monkeypatch, asked, used) -> None:  # type: ignore[no-untyped-def]
    taken = []
    monkeypatch.setattr(deepspeed_engine, "swapped", lambda engine, shadow: taken.append(shadow))
    ema = Ema(engine_of([1.0]), DECAYS)
    config = SimpleNamespace(ema_decays=DECAYS)
    Averages(None, None, ema, config, None)._in_place(asked)  # type: ignore[arg-type]
    assert taken == [ema.shadows[used]]
