"""Charts as SVG: inline, coloured by the page's style sheet, or as files that contain the style rules."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from report.markup import Html, fill, whole
from report.style import chart_file_style

WIDTH, HEIGHT = 320, 180  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 22  # margins around the plot
FILE_SIZE = (720, 300)  # size of a chart in a file
FILE_HEAD = 52  # height of title and legend above the plot
CHARACTER_WIDTH = 7  # upper bound for a character of the legend
MAX_POINTS = 400
BAR_HEIGHT = 24
NUM_COLOURS = 8  # number of colours in the style sheet

_CURVES = """\
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">
{% for place, text in ticks %}
<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ place }}" y2="{{ place }}"/>\
<text x="{{ left - 6 }}" y="{{ place }}" dy="3.5" text-anchor="end">{{ text }}</text>
{% endfor %}
{% for place, event in marks %}
<line class="mark" x1="{{ place }}" x2="{{ place }}" y1="{{ top }}" y2="{{ bottom }}"><title>{{ event }}</title></line>
{% endfor %}
{% for curve, places, level in curves %}
<polyline class="{{ curve.classes }}" \
points="{% for x, y in places %}{{ ' ' if not loop.first }}{{ x }},{{ y }}{% endfor %}"/>
{% if is_detailed %}
{% for x, y in places %}<circle class="{{ curve.classes }}" cx="{{ x }}" cy="{{ y }}" r="2.5"/>{% endfor %}

{% endif %}
{% if level %}
<line class="{{ curve.classes }} level" x1="{{ left }}" x2="{{ right }}" y1="{{ level }}" y2="{{ level }}"/>
{% endif %}
{% endfor %}
{% for x, text, anchor in labels %}
<text x="{{ x }}" y="{{ height - 5 }}" text-anchor="{{ anchor }}">{{ text }}</text>
{% endfor %}
</svg>"""
_FILE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height + head }}" width="{{ width }}" \
height="{{ height + head }}" role="img" aria-label="{{ title }}">
<style>
{{ style }}svg text { font-size: 12px; }
</style>
<rect width="100%" height="100%" fill="white"/><text x="{{ margin }}" y="20">{{ title }}</text>
{% for curve, x in legend %}
<line class="{{ curve.classes }}" x1="{{ x }}" x2="{{ x + 20 }}" y1="38" y2="38"/>\
<text x="{{ x + 26 }}" y="42">{{ curve.name }}</text>
{% endfor %}
<svg y="{{ head }}" width="{{ width }}" height="{{ height }}">{{ chart }}</svg></svg>
"""
_STACKED = """\
<svg class="bars" viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">\
<rect class="rest" width="{{ width }}" height="{{ height }}"/>
{% for number, left, extent, name, share in parts %}
<rect class="p{{ number }}" x="{{ left }}" y="0" width="{{ extent }}" height="{{ height }}">\
<title>{{ name }} {{ share }}</title></rect>
{% endfor %}
</svg>"""
_BARS = """\
<svg class="bars" viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">
{% for name, text, top, extent, end in bars %}
<text x="{{ left - 10 }}" y="{{ top + 16 }}" text-anchor="end">{{ name }}</text>\
<rect class="bar" x="{{ left }}" y="{{ top + 4 }}" width="{{ extent }}" height="16" rx="2"/>\
<text x="{{ end }}" y="{{ top + 16 }}">{{ text }}</text>
{% endfor %}
</svg>"""


@dataclass(frozen=True)
class Axis:
    """Maps values to 0 (lowest) to 1 (highest), on a logarithmic scale if all are positive and span a factor of 5."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Axis:
        """An axis that holds all of `values`, at least one."""
        low, high = min(values), max(values)
        if low > 0 and high > 5 * low:
            return cls(low, high, True)
        margin = abs(low) / 2 or 0.5
        return cls(low - margin, high + margin, False) if low == high else cls(low, high, False)

    def place(self, value: float) -> float:
        """Position of `value` on the axis, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Three to six round numbers, with labels that differ from each other."""
        values = _log_ticks(self.low, self.high) if self.logarithmic else _ticks(self.low, self.high)
        labels = [short(value) for value in values]
        if len(set(labels)) < len(labels):  # a narrow range far from zero
            labels = [f"{value:.6g}" for value in values]
        return list(zip(values, labels, strict=True))


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]  # x ascending; at least one
    colour: int = 0  # number of the colour in the style sheet
    is_faint: bool = False  # drawn faintly, under its smoothed curve
    level: float | None = None  # reference value: a dashed line across

    @property
    def classes(self) -> str:
        """The curve's classes in the style sheet."""
        return "curve" + (f" c{self.colour}" if self.colour else "") + (" faint" if self.is_faint else "")


def line_chart(points: Sequence[tuple[float, float]], label: str) -> Html:
    """A curve over steps. `points`: (step, value), steps ascending, at least one."""
    return curve_chart([Curve("", points)], label)


def curve_chart(
    curves: Sequence[Curve],
    label: str,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    unit: str = "step",
    marks: Sequence[tuple[float, str]] = (),
    axis: Axis | None = None,
    is_detailed: bool = False,
) -> Html:
    """Curves on shared axes, at least one. `unit`: the unit of x; `marks`: (x, what happened there), dashed lines.

    `axis`: the axis of the values (default: one that holds them all). `is_detailed`: with rings at the points and round
    numbers along x.
    """
    width, height = size
    curves = [dataclasses.replace(curve, points=thinned(curve.points)) for curve in curves]
    levels = [curve.level for curve in curves if curve.level is not None]
    axis = axis or Axis.of([*levels, *(value for curve in curves for _, value in curve.points)])
    steps = [x for curve in curves for x, _ in curve.points]
    first, last = min(steps), max(steps)
    span = (last - first) or 1.0

    def x(step: float) -> float:
        return LEFT + (step - first) / span * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - axis.place(value)) * (height - TOP - BOTTOM)

    labels = [(float(LEFT), f"{unit} {short(first)}", "start"), (float(width - RIGHT), short(last), "end")]
    if is_detailed and last > first:
        labels = [(x(step), text, "middle") for step, text in Axis(first, last, False).ticks()]
    return fill(
        _CURVES,
        width=width,
        height=height,
        label=label,
        left=LEFT,
        right=width - RIGHT,
        top=TOP,
        bottom=height - BOTTOM,
        ticks=[(f"{y(value):.1f}", text) for value, text in axis.ticks()],
        marks=[(f"{x(step):.1f}", event) for step, event in marks if first <= step <= last],
        curves=[
            (
                curve,
                [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in curve.points],
                "" if curve.level is None else f"{y(curve.level):.1f}",
            )
            for curve in sorted(curves, key=lambda curve: not curve.is_faint)
        ],
        labels=[(f"{left:.1f}", text, anchor) for left, text, anchor in labels],
        is_detailed=is_detailed,
    )


def chart_file(curves: Sequence[Curve], title: str, axis: Axis | None = None) -> str:
    """The chart as an SVG file that stands alone: styles, white ground (for dark pages too), title and legend inside.

    `title` names the two axes. Curves without a name are not in the legend.
    """
    width, height = FILE_SIZE
    legend, left = [], float(LEFT)
    for curve in curves:
        if curve.name:
            legend.append((curve, left))
            left += 60 + CHARACTER_WIDTH * len(curve.name)
    chart = curve_chart(curves, title, size=FILE_SIZE, axis=axis, is_detailed=True)
    size = {"width": width, "height": height, "head": FILE_HEAD, "margin": LEFT}
    return whole(fill(_FILE, **size, title=title, legend=legend, chart=chart, style=chart_file_style()))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points and the last one: lowest and highest of each stretch, so that no spike is lost."""
    stride = 2 * -(-len(points) // MAX_POINTS)
    if stride == 2:
        return list(points)
    kept = []
    for begin in range(0, len(points), stride):
        stretch = points[begin : begin + stride]
        ends = (min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1]))
        kept += sorted(set(ends))
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[tuple[float, float]], reach: int) -> list[tuple[float, float]]:
    """The mean of each point and its neighbours, up to `reach` on either side, as many on both: nothing lags."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    result = []
    for place, (step, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        result.append((step, (sums[place + near + 1] - sums[place - near]) / (2 * near + 1)))
    return result


def stacked_bar(parts: Sequence[tuple[str, float]], label: str) -> Html:
    """One bar of shares that add up to 1 at most; colours in order, names in the tooltip."""
    width, left, shown = 720, 0.0, []
    for number, (name, share) in enumerate(parts):
        extent = share * width
        shown.append((number % NUM_COLOURS, f"{left:.1f}", f"{extent:.1f}", name, f"{share:.1%}"))
        left += extent
    return fill(_STACKED, width=width, height=18, label=label, parts=shown)


def bar_chart(bars: Sequence[tuple[str, float, str]], label: str) -> Html:
    """Horizontal bars: (name, length >= 0, text beside the bar), at least one."""
    longest = max(length for _, length, _ in bars) or 1.0
    left, right, width = 150, 70, 720
    shown = []
    for place, (name, length, text) in enumerate(bars):
        extent = length / longest * (width - left - right)
        shown.append((name, text, place * BAR_HEIGHT, f"{max(extent, 1):.1f}", f"{left + extent + 8:.1f}"))
    return fill(_BARS, width=width, height=len(bars) * BAR_HEIGHT, left=left, label=label, bars=shown)


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
    """Powers of ten in [low, high], with 2 and 5 times a power if that leaves at most six."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    return fine if len(fine) <= 6 else [power for power in powers if low <= power <= high]
