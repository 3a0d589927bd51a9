"""Which of two is better, or that it cannot be told."""

from __future__ import annotations

from evaluation.metrics.interval import Estimate

SAME = 0.02
"""Relative difference up to which two feature distances count as equal: they have no interval."""
SAME_TEXT = f"less than {SAME:.0%} apart"
OVERLAP_TEXT = "intervals overlap"


def has_less(first: float, second: float) -> bool | None:
    """Whether the first distance is the smaller one; None: they are too close."""
    if abs(first - second) <= SAME * max(first, second):
        return None
    return first < second


def has_more(first: Estimate, second: Estimate) -> bool | None:
    """Whether the first rate is the higher one; None: their intervals overlap."""
    if first.low <= second.high and second.low <= first.high:
        return None
    return first.mean > second.mean
