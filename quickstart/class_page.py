"""The page of `make quickstart-class`: scores of each kind of latents by time and by step, and the paper's order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.interval import Estimate
from quickstart.score_order import OVERLAP_TEXT, SAME_TEXT, has_less, has_more
from report.charts import Axis, Curve, chart_file

LABELS = {"rpiae": "RPiAE", "rae": "RAE", "vae": "VAE"}
"""Names of the latents, in the paper's order of generation, best first."""
PAPER_GFID = {"rpiae": "1.68", "rae": "1.87", "vae": "2.17"}
"""The paper's Table 8: 800 epochs, without guidance."""
TITLES = {
    "distance": "Feature distance (less is better) over training seconds; dashed: reconstructions",
    "right": "Class right (more is better) over training seconds; dashed: reconstructions",
}
"""Titles of `charts`, by name."""


@dataclass(frozen=True)
class Point:
    """The scores of one export of one training."""

    latents: str  # key of LABELS
    step: int
    seconds: float | None  # training time up to this step; None: not logged
    distance: float
    class_right: Estimate

    def text(self) -> str:
        """One line for the console."""
        time = "" if self.seconds is None else f" after {self.seconds:.0f} s"
        return (
            f"{LABELS[self.latents]}, step {self.step}{time}: feature distance {self.distance:.3f}, "
            f"class right {_rate(self.class_right)}"
        )


@dataclass(frozen=True)
class Reference:
    """The upper bound of drawings: scores of the autoencoder's reconstructions of real images."""

    distance: float
    class_right: Estimate


def page(
    points: Sequence[Point],
    references: Mapping[str, Reference],
    machine: str,
    images: Mapping[str, str],
    *,
    network: str,
    num_images: int,
    num_real: int,
) -> str:
    """The page as Markdown. `images`: name in `charts` -> path from the page; `network`: the network's shape."""
    lines = [
        "# Class-conditional generation in miniature",
        "",
        f"Written by `make quickstart-class` ({machine}). Emoji scenes of one object at 64 px, 44 classes, latents of "
        f"4x4; the same LightningDiT ({network}) on each kind of latents, but for its first and last layer; "
        f"one seed, minutes of training. It is no substitute for ImageNet. {num_images} images are drawn with each "
        f"export (Euler, without guidance) and compared with {num_real} real ones. The feature distance is Fréchet's "
        "in the features of a ViT that no tokenizer has seen (smaller is better; not FID). *Class right*: the judge "
        "sees the asked object and nothing else; 95 % intervals. *Reconstructions* are real images through the "
        "autoencoder: no drawing of it can be much better. *Training seconds* are those spent in steps (`step_s` of "
        "metrics.jsonl: data, forward, backward, optimizer, and waiting in them); start, samples, checkpoints and "
        "exports do not count.",
        "",
        "## At equal training time",
        "",
        *at_equal_time(points),
        "",
        *(f"![{TITLES[name]}]({path})" for name, path in images.items()),
        "",
        "## By step",
        "",
        *_by_step(points, references),
    ]
    return "\n".join(lines) + "\n"


def at_equal_time(points: Sequence[Point]) -> list[str]:
    """Lines for page and console: every training at the time when the fastest was done, and the verdict there."""
    runs = _timed(points)
    ends = {name: times[-1] for name, (times, _) in runs.items()}
    fastest = min(ends, key=lambda name: ends[name], default="")
    there = {name: at_time(*run, ends[fastest]) for name, run in runs.items()}
    found = {name: point for name, point in there.items() if point is not None}
    missing = [label for name, label in LABELS.items() if name not in found]
    notes = []
    if missing:
        notes = [
            f"Left out: {', '.join(missing)}. metrics.jsonl does not say how long the steps took, or the fastest "
            "training was done before the first export.",
            "",
        ]
    if len(found) < 2:
        return [*notes, "There are no two trainings to compare at equal time."]
    rows = []
    for name, point in found.items():
        pace_ms = 1000 * ends[name] / runs[name][1][-1].step
        values = f"{point.distance:.2f}", _rate(point.class_right)
        rows.append((LABELS[name], PAPER_GFID[name], str(point.step), f"{pace_ms:.0f}", *values))
    return [
        f"After {ends[fastest]:.0f} s, when {LABELS[fastest]} had done its {found[fastest].step} steps. The others' "
        "values are interpolated linearly between the exports before and after, and so are their intervals; their "
        "learning rate had not come to its end.",
        "",
        *_table(
            ("latents", "gFID in the paper", "steps by then", "ms a step", "distance", "class right"), rows
        ),
        "",
        *notes,
        verdict(found, "at equal time"),
    ]


def at_time(times: Sequence[float], run: Sequence[Point], seconds: float) -> Point | None:
    """A training's scores after `seconds`, interpolated linearly between two exports; None: outside its exports.

    `times`: seconds of the points of `run`, ascending.
    """
    if not times[0] <= seconds <= times[-1]:
        return None

    def value(of: Callable[[Point], float]) -> float:
        return float(np.interp(seconds, times, [of(point) for point in run]))

    right = Estimate(
        value(lambda point: point.class_right.mean),
        value(lambda point: point.class_right.low),
        value(lambda point: point.class_right.high),
        run[-1].class_right.n,
    )
    step = round(value(lambda point: point.step))
    return Point(run[0].latents, step, seconds, value(lambda point: point.distance), right)


def verdict(points: Mapping[str, Point], where: str) -> str:
    """Whether the paper's order appears, pair by pair, by both measures. `points`: kind of latents -> its point."""
    pairs = list(itertools.combinations([name for name in LABELS if name in points], 2))

    def judged(holds: Callable[[Point, Point], bool | None], unclear: str) -> str:
        words = {
            True: "appears",
            False: "does not appear, the reverse does",
            None: f"cannot be told ({unclear})",
        }
        return "; ".join(
            f"{LABELS[a]} before {LABELS[b]} {words[holds(points[a], points[b])]}" for a, b in pairs
        )

    distances = judged(lambda a, b: has_less(a.distance, b.distance), SAME_TEXT)
    rights = judged(lambda a, b: has_more(a.class_right, b.class_right), OVERLAP_TEXT)
    return f"The paper's order {where}, by distance: {distances}. By class right: {rights}."


def charts(points: Sequence[Point], references: Mapping[str, Reference]) -> dict[str, str]:
    """SVG files by name: a curve for each training whose seconds are known; {} without such trainings."""
    runs = _timed(points)
    if not runs:
        return {}

    def curves(value: Callable[[Point], float], mark: Callable[[Reference], float]) -> list[Curve]:
        found = []
        for colour, (name, label) in enumerate(LABELS.items()):
            if name in runs:
                places = [(time, value(point)) for time, point in zip(*runs[name], strict=True)]
                found.append(Curve(label, places, colour, level=mark(references[name])))
        return found

    distances = curves(lambda point: point.distance, lambda reference: reference.distance)
    rights = curves(lambda point: point.class_right.mean, lambda reference: reference.class_right.mean)
    return {
        "distance": chart_file(distances, TITLES["distance"]),
        "right": chart_file(rights, TITLES["right"], Axis(0.0, 1.0, False)),
    }


def _by_step(points: Sequence[Point], references: Mapping[str, Reference]) -> Iterator[str]:
    """Three tables with a column for every step, and the verdict at each training's last step."""
    runs = _runs(points)
    steps = sorted({point.step for point in points})

    def rows(cell: Callable[[Point], str], mark: Callable[[Reference], str] | None) -> list[tuple[str, ...]]:
        found = []
        for name, run in runs.items():
            cells = {point.step: cell(point) for point in run}
            marks = (mark(references[name]),) if mark else ()
            found.append((LABELS[name], *(cells.get(step, "-") for step in steps), *marks))
        return found

    heads = tuple(f"step {step}" for step in steps)
    yield from _table(
        ("distance", *heads, "reconstructions"),
        rows(lambda p: f"{p.distance:.2f}", lambda r: f"{r.distance:.2f}"),
    )
    yield ""
    yield from _table(
        ("class right", *heads, "reconstructions"),
        rows(lambda p: _rate(p.class_right), lambda r: _rate(r.class_right)),
    )
    yield ""
    seconds = rows(lambda p: "-" if p.seconds is None else f"{p.seconds:.0f}", None)
    yield from _table(("training seconds", *heads), seconds)
    yield ""
    yield verdict({name: run[-1] for name, run in runs.items()}, "at the last step")


def _runs(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each training, in the paper's order and by step."""
    runs = {
        name: sorted((point for point in points if point.latents == name), key=lambda point: point.step)
        for name in LABELS
    }
    return {name: run for name, run in runs.items() if run}


def _timed(points: Sequence[Point]) -> dict[str, tuple[list[float], list[Point]]]:
    """The trainings of `_runs` whose seconds are all known, each with its seconds."""
    timed = {}
    for name, run in _runs(points).items():
        times = [point.seconds for point in run if point.seconds is not None]
        if len(times) == len(run):
            timed[name] = (times, run)
    return timed


def _rate(right: Estimate) -> str:
    return f"{right.mean:.3f} ({right.low:.3f}-{right.high:.3f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, aligned so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in (header, *rows)
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
