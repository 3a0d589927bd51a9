"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` items and its 95 % confidence interval; nan where undefined (n = 0)."""

    mean: float
    low: float
    high: float
    n: int


def rate(successes: Sequence[bool]) -> Estimate:
    """Share of True with the Wilson score interval (Wilson 1927), which is sound near 0 and 1 too."""
    n = len(successes)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    share = sum(successes) / n
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0), n)


def mean(values: Sequence[float]) -> Estimate:
    """Mean with the normal interval, mean +- 1.96 s / sqrt(n); a single value has no interval (nan)."""
    n = len(values)
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    centre = math.fsum(values) / n
    half = Z_95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(centre, centre - half, centre + half, n)


def mean_of_means(groups: Sequence[Sequence[float]]) -> Estimate:
    """Unweighted mean of the groups' means; each group's variance of the mean adds up (stratified sampling).

    `n` counts all values. The interval is nan if a group has a single value; the mean is nan too if a group is empty.
    """
    parts = [mean(values) for values in groups]
    n = sum(part.n for part in parts)
    if not parts or any(part.n == 0 for part in parts):
        return Estimate(math.nan, math.nan, math.nan, n)
    centre = math.fsum(part.mean for part in parts) / len(parts)
    half = math.sqrt(math.fsum((part.high - part.mean) ** 2 for part in parts)) / len(parts)
    return Estimate(centre, centre - half, centre + half, n)
