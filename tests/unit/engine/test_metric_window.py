"""The metrics of a window: means per unit over all ranks and steps, the source's ledger, rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.objective import LossOutput
from engine.metric_window import Window

Together = Callable[..., list[Any]]
PEAK_FLOPS = 1e6
# (units of the loss, units of the further term, loss, further term, FLOPs) of one pack
packs = st.tuples(
    st.integers(0, 5), st.integers(0, 3), st.integers(-9, 9), st.integers(-9, 9), st.integers(0, 9)
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[list[Any]]]:
    """A number of ranks, and the packs of each step: as many a step, at least one a rank."""
    world = draw(st.integers(1, 3))
    streams = draw(st.integers(world, 5))
    steps = draw(st.lists(st.lists(packs, min_size=streams, max_size=streams), min_size=1, max_size=3))
    return world, steps


def follow(ranks: Any, steps: list[list[Any]]) -> list[dict[str, float]]:
    """What the window reads after these steps, and once more after them alone."""
    window = Window(ranks, PEAK_FLOPS)
    found = []
    for _ in range(2):
        for number, step in enumerate(steps):
            for _, _, loss, further, flops in step[ranks.rank :: ranks.world]:
                metrics = {"rec": torch.tensor(2.0 * loss)}
                window.add("", LossOutput(torch.tensor(float(loss)), metrics, flops=flops), 1.0)
                window.add("text_", LossOutput(torch.tensor(float(further))), 1.0)
            window.add("", LossOutput(torch.tensor(1e3), {"rec": torch.tensor(1e3)}, flops=1e3), 0.0)
            counts = {"": float(sum(pack[0] for pack in step)), "text_": float(sum(pack[1] for pack in step))}
            ledger = {
                "samples": 2.0 + ranks.rank,
                "samples/set": 1.0,
                "tokens": 10.0,
                "fill": 0.25 * (1 + ranks.rank),
                "samples_seen": 100.0 * (number + 1) + ranks.rank,
                "samples_pending": 7.0 - number,
            }
            window.close_step(counts, ledger, 0.5)
        found.append(window.read())
    return found


@settings(max_examples=40, deadline=None)
@given(runs())
def test_a_window_is_the_mean_over_the_union_of_all_packs(
    together: Together, run: tuple[int, list[list[Any]]]
) -> None:
    """Whatever the ranks; a pack at weight 0 is nothing; a read leaves nothing behind; zero units give no mean."""
    world, steps = run
    everything = [pack for step in steps for pack in step]
    units, texts, loss, further, flops = (sum(pack[part] for pack in everything) for part in range(5))
    num, last = len(steps), len(steps) - 1
    samples = num * sum(2.0 + rank for rank in range(world))
    ranks_sum = world * (world - 1) / 2
    expected = {
        "loss": loss / max(units, 1),
        "rec": 2 * loss / max(units, 1),
        "step_s": 0.5,
        "samples": samples,
        "samples_per_s": samples / (0.5 * num),
        "samples/set": float(num * world),
        "samples/set_per_s": 2.0 * world,
        "tokens": 10.0 * num * world,
        "tokens_per_s": 20.0 * world,
        "fill": 0.25 * (1 + ranks_sum / world),
        "samples_seen": 100.0 * num * world + ranks_sum,
        "samples_pending": (7.0 - last) * world,
    }
    if texts:
        expected["text_loss"] = further / texts
    if flops:
        per_s = flops / (0.5 * num) / world
        expected |= {"tflops_per_s": per_s / 1e12, "mfu": per_s / PEAK_FLOPS}
    for found in together(world, lambda ranks: follow(ranks, steps)):
        for window in found:
            assert window == pytest.approx(expected, rel=1e-6)
