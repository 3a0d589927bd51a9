"""Decides which of two scores is better, or that the scores do not tell."""

from __future__ import annotations

from evaluation.metrics.interval import Estimate

SAME = 0.02
"""Relative difference up to which two feature distances count as equal; a distance has no interval."""
SAME_TEXT = f"less than {SAME:.0%} apart"
OVERLAP_TEXT = "intervals overlap"


def has_less(first: float, second: float) -> bool | None:
    """Whether the first distance is smaller; None: the two are too close."""
    if abs(first - second) <= SAME * max(first, second):
        return None
    return first < second


def has_more(first: Estimate, second: Estimate) -> bool | None:
    """Whether the first rate is higher; None: the intervals overlap."""
    if first.low <= second.high and second.low <= first.high:
        return None
    return first.mean > second.mean
