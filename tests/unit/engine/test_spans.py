"""Where the time of a step goes: every moment counts once."""

from __future__ import annotations

import time

import pytest
import torch

from engine.spans import Spans


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds; a test moves it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_part_inside_another_counts_for_itself_alone(clock) -> None:
    spans = Spans(torch.device("cpu"))
    with spans("backward"):
        clock[0] += 3
        for _ in range(2):
            with spans("communication"):
                clock[0] += 1
        clock[0] += 1
    with spans("communication"):
        clock[0] += 1
    clock[0] += 3
    assert spans.read() == pytest.approx({"backward_share": 0.4, "communication_share": 0.3})


def test_a_part_that_raises_is_closed(clock) -> None:
    spans = Spans(torch.device("cpu"))
    with pytest.raises(RuntimeError), spans("forward"), spans("communication"):
        clock[0] += 1
        raise RuntimeError
    with spans("data"):
        clock[0] += 1
    assert spans.read() == pytest.approx({"forward_share": 0, "communication_share": 0.5, "data_share": 0.5})


def test_reading_begins_anew(clock) -> None:
    spans = Spans(torch.device("cpu"))
    with spans("data"):
        clock[0] += 1
    spans.read()
    clock[0] += 1
    assert spans.read() == {}
