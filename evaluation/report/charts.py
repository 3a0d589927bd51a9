"""Charts as inline SVG; colours and fonts come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 320, 180  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 22  # margins around the plot
MAX_POINTS = 400
BAR_HEIGHT = 24


def line_chart(points: Sequence[tuple[float, float]], label: str) -> str:
    """A curve over steps, logarithmic in y where all values are positive and span more than a factor of 5.

    `points`: (step, value), steps ascending, at least one.
    """
    stride = -(-len(points) // MAX_POINTS)
    points = [*points[::stride], points[-1]]
    values = [value for _, value in points]
    logarithmic = min(values) > 0 and max(values) > 5 * min(values)
    heights = [math.log10(value) if logarithmic else value for value in values]
    low, high = min(heights), max(heights)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    first, last = points[0][0], points[-1][0]
    span = (last - first) or 1.0

    def x(step: float) -> float:
        return LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT)

    def y(height: float) -> float:
        return TOP + (high - height) / (high - low) * (HEIGHT - TOP - BOTTOM)

    grid = []
    for value in _log_ticks(min(values), max(values)) if logarithmic else _ticks(low, high):
        place = f"{y(math.log10(value) if logarithmic else value):.1f}"
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>')
        grid.append(f'<text x="{LEFT - 6}" y="{place}" dy="3.5" text-anchor="end">{short(value)}</text>')
    curve = " ".join(
        f"{x(step):.1f},{y(height):.1f}" for (step, _), height in zip(points, heights, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(grid)}'
        f'<polyline class="curve" points="{curve}"/>'
        f'<text x="{LEFT}" y="{HEIGHT - 5}">step {short(first)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{short(last)}</text></svg>'
    )


def bar_chart(bars: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars: (name, length >= 0, text beside the bar), at least one."""
    longest = max(length for _, length, _ in bars) or 1.0
    left, right, width = 150, 70, 720
    rows = []
    for place, (name, length, text) in enumerate(bars):
        top = place * BAR_HEIGHT
        extent = length / longest * (width - left - right)
        rows.append(f'<text x="{left - 10}" y="{top + 16}" text-anchor="end">{escape(name)}</text>')
        rows.append(
            f'<rect class="bar" x="{left}" y="{top + 4}" width="{max(extent, 1):.1f}" height="16" rx="2"/>'
        )
        rows.append(f'<text x="{left + extent + 8:.1f}" y="{top + 16}">{escape(text)}</text>')
    return (
        f'<svg class="bars" viewBox="0 0 {width} {len(bars) * BAR_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(rows)}</svg>'
    )


def short(value: float) -> str:
    """A number in few characters: 0.0123, 3.4, 1200, 15k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers inside [low, high]."""
    raw = (high - low) / 4
    power: float = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.99)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with their double and fivefold where that leaves at most six."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    return fine if len(fine) <= 6 else [power for power in powers if low <= power <= high]
