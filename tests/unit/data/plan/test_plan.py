"""The plan (docs/architecture.md, 2): an epoch's order is a fixed permutation, dealt to streams, alike everywhere."""

from __future__ import annotations

import time

import numpy as np
import pytest

from base.config import UserError
from data.plan.plan import epoch_order, pack_seed, sample_uniforms

GOLDEN_SMALL = [6, 7, 9, 8, 11, 10]
GOLDEN_LARGE = 867043166  # sum of position * index, modulo 1e9 + 7
GOLDEN_PACK_SEED = 8001251174508603180


@pytest.mark.parametrize(
    ("num_samples", "num_streams"), [(1, 1), (8, 8), (9, 8), (127, 2), (1000, 3), (20_000, 8)]
)
def test_streams_together_hold_every_sample_once(num_samples: int, num_streams: int) -> None:
    for epoch in range(2):
        streams = [
            epoch_order(num_samples, "f", 0, epoch, num_streams, stream) for stream in range(num_streams)
        ]
        assert all(len(stream) > 0 for stream in streams)
        assert sorted(np.concatenate(streams).tolist()) == list(range(num_samples))


def test_order_never_changes() -> None:
    """Golden: a resumed run on another numpy must see the same order."""
    assert epoch_order(20, "fingerprint", 1, 2, 3, 1).tolist() == GOLDEN_SMALL
    order = epoch_order(100_000, "fingerprint", 1, 2, 8, 5)
    assert int((order * np.arange(1, len(order) + 1)).sum() % 1_000_000_007) == GOLDEN_LARGE


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"seed": 1}, {"epoch": 1}, {"stream": 1}])
def test_order_depends_on_each_of_its_inputs(change: dict[str, object]) -> None:
    base = {"num_samples": 5000, "fingerprint": "f", "seed": 0, "epoch": 0, "num_streams": 2, "stream": 0}
    assert epoch_order(**base).tolist() != epoch_order(**{**base, **change}).tolist()  # type: ignore[arg-type]


def test_window_of_a_stream_reads_at_most_32_blocks() -> None:
    """A window of 2048 samples touches 32 blocks of 64: reads stay nearly sequential."""
    order = epoch_order(64 * 32 * 4 * 2, "f", 0, 0, 2, 0)
    for window in order.reshape(-1, 64 * 32):
        assert len(np.unique(window // 64)) == 32
        assert np.abs(np.diff(window)).min() >= 1
        assert (np.diff(window) == 1).mean() < 0.05  # shuffled: 1/2048 expected


def test_samples_are_shuffled_over_the_whole_data_set() -> None:
    order = epoch_order(100_000, "f", 0, 0, 4, 0)
    # Rank correlation of position and index: sd 1/sqrt(391 blocks) = 0.05, bound at 4 sd.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


def test_fewer_samples_than_streams_is_refused() -> None:
    with pytest.raises(UserError, match="7 samples cannot feed num_streams = 8"):
        epoch_order(7, "f", 0, 0, 8, 0)


def test_eleven_million_samples_are_planned_in_seconds() -> None:
    begin = time.perf_counter()
    assert len(epoch_order(11_000_000, "f", 0, 0, 8, 3)) >= 11_000_000 // 8 - 64
    assert time.perf_counter() - begin < 10  # measured 0.3 s; a loop over samples would take more than 10


def test_seeds_never_change_and_never_collide() -> None:
    assert pack_seed(0, 0, 0) == GOLDEN_PACK_SEED
    seeds = {pack_seed(seed, step, stream) for seed in range(3) for step in range(100) for stream in range(8)}
    assert len(seeds) == 3 * 100 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_choices_about_samples_are_uniform_and_independent() -> None:
    draws = np.array([sample_uniforms(0, epoch, f"key{key}") for epoch in range(2) for key in range(2000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02  # sd of a mean of 4000: 0.0046
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.08  # sd 1/sqrt(4000) = 0.016
    assert np.abs(np.corrcoef(draws[:2000, 0], draws[2000:, 0])[0, 1]) < 0.1  # epochs: sd 0.022
