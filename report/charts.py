"""Charts of a page: curves drawn by matplotlib as SVG, which may also be files of their own, and bars in HTML."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from base.terminal import printable
from report.markup import Html, fill, vector
from report.style import CURVES, LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 320, 180  # px; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 22  # margins around the plot
FILE_SIZE = (720, 352)  # size of a chart in a file
FILE_HEAD = 62  # height of title and legend above the plot
MAX_POINTS = 400
NUM_COLOURS = len(CURVES)
SETTINGS: dict[Any, Any] = {
    "axes.titlelocation": "left",
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page's style sheet puts its own in its place
    "font.size": 10,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 1,
    "path.simplify": False,  # it would take points out
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "RPiAE",  # equal charts are equal bytes
    "text.color": LIGHT["soft"],
    "text.parse_math": False,  # a dollar is a dollar
    "xtick.bottom": False,
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "ytick.left": False,
}
_STACKED = """\
<div class="stack" role="img" aria-label="{{ label }}">
{% for name, share in parts %}
<i class="k{{ loop.index0 % num_colours }}" style="width: {{ '%.2f' | format(share * 100) }}%" \
title="{{ name }} {{ '%.1f' | format(share * 100) }}%"></i>
{% endfor %}
</div>"""
_BARS = """\
<div class="bars" role="group" aria-label="{{ label }}">
{% for name, length, text in bars %}
<span>{{ name }}</span>\
<div><i class="k0" style="width: {{ '%.2f' | format(length / longest * 100) }}%"></i> {{ text }}</div>
{% endfor %}
</div>"""


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
        return (value - self.low) / ((self.high - self.low) or 1.0)

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
    colour: int = 0  # number of the colour among the style sheet's CURVES
    is_faint: bool = False  # drawn faintly, under its smoothed curve
    level: float | None = None  # reference value: a dashed line across


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
) -> Html:
    """Curves on shared axes, at least one. `unit`: the unit of x; `marks`: (x, what happened there), dashed lines."""
    with _settings():
        figure, axes, across = _plot(curves, size, TOP)
        shown = [(across.place(x), event) for x, event in marks if across.low <= x <= across.high]
        for number, (place, _) in enumerate(shown):
            line = axes.axvline(place, color=LIGHT["bad"], lw=1, ls="--", alpha=0.7, clip_on=False)
            line.set_gid(f"mark {number}")
        axes.set_xticks([0, 1], [f"{unit} {short(across.low)}", short(across.high)])
        begin, end = axes.get_xticklabels()
        begin.set_horizontalalignment("left")
        end.set_horizontalalignment("right")
        titles = {f"mark {number}": event for number, (_, event) in enumerate(shown)}
        return vector(_written(figure), size, label, titles)


def chart_file(curves: Sequence[Curve], title: str, axis: Axis | None = None) -> str:
    """The chart as an SVG file that stands alone: white ground (for dark pages too), title and legend inside.

    `title` names the two axes; `axis`: the axis of the values (default: one that holds them all).
    """
    with _settings():
        figure, axes, across = _plot(curves, FILE_SIZE, FILE_HEAD, axis, marker="o", fillstyle="none")
        places, labels = zip(*across.ticks(), strict=True)
        axes.set_xticks([across.place(place) for place in places], labels)
        axes.set_title(printable(title), pad=32)
        names = [printable(curve.name) for curve in curves]
        axes.legend(axes.lines[: len(names)], names, loc=(0, 1.01), ncols=len(names), frameon=False)
        return _written(figure)


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
    return fill(_STACKED, parts=parts, label=label, num_colours=NUM_COLOURS)


def bar_chart(bars: Sequence[tuple[str, float, str]], label: str) -> Html:
    """Horizontal bars: (name, length >= 0, text beside the bar), at least one."""
    longest = max(length for _, length, _ in bars) or 1.0
    return fill(_BARS, bars=bars, longest=longest, label=label)


def short(value: float) -> str:
    """A number in few characters: 0.0123, 3.4, 1200, 15k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers inside [low, high]."""
    raw = (high - low) / 4
    if raw == 0:
        return [low]
    power: float = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.99)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times a power if that leaves at most six."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    fine = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    return fine if len(fine) <= 6 else [power for power in powers if low <= power <= high]


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Loads matplotlib, half a second at first; applies SETTINGS, and keeps its notes on fonts from the terminal."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a person's matplotlibrc changes nothing
        matplotlib.rcParams.update(SETTINGS)
        warnings.simplefilter("ignore")  # of characters that its font lacks: a browser finds another font
        yield


def _plot(
    curves: Sequence[Curve], size: tuple[int, int], head: int, axis: Axis | None = None, **style: Any
) -> tuple[Figure, Axes, Axis]:
    """Curves, faint ones below, and levels on the unit square, under `head` px; returns the axis of the steps, too."""
    from matplotlib.figure import Figure

    (width, height), steps = size, [x for curve in curves for x, _ in curve.points]
    across = Axis(min(steps), max(steps), False)
    levels = [curve.level for curve in curves if curve.level is not None]
    axis = axis or Axis.of([*levels, *(value for curve in curves for _, value in curve.points)])
    figure = Figure((width / 72, height / 72), dpi=72)
    place = (LEFT / width, BOTTOM / height, (width - LEFT - RIGHT) / width, (height - head - BOTTOM) / height)
    axes = figure.add_axes(place, xlim=(0, 1), ylim=(0, 1), frame_on=False)
    for curve in curves:
        points, colour = thinned(curve.points), LIGHT[CURVES[curve.colour]]
        (line,) = axes.plot(
            [across.place(x) for x, _ in points],
            [axis.place(value) for _, value in points],
            color=colour, clip_on=False, **style,
        )  # fmt: skip
        line.set(lw=1, alpha=0.3, zorder=1.9) if curve.is_faint else line.set(lw=1.6)
    for curve in curves:
        if curve.level is not None:
            axes.axhline(
                axis.place(curve.level), color=LIGHT[CURVES[curve.colour]], lw=1, ls="--", clip_on=False
            )
    values, labels = zip(*axis.ticks(), strict=True)
    axes.set_yticks([axis.place(value) for value in values], labels)
    axes.grid(axis="y", clip_on=False)
    return figure, axes, across


def _written(figure: Figure) -> str:
    """The SVG of a figure, without the time of its making."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    return file.getvalue()
