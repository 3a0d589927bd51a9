"""Every number that a run logs, as small charts under headings; several runs share axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from report.charts import NUM_COLOURS, Curve, curve_chart, short, smoothed
from report.gallery import grid
from report.markup import Html, absent, fill, together
from report.watch.run import SECONDS, TROUBLE, Run, Unit

WIDE = (1180, 300)
SMOOTH_FROM = 80  # a curve of more points is drawn as an average over the faint values
SMOOTH_PART = 60  # the average reaches over one part in this many on either side
UNITS = {"_gib": ", GiB", "_s": ", s", "_w": ", W", "_c": ", °C"}
HEADINGS = ("Scores", "Losses and quality", "Optimisation", "Speed", "Machine")
ELSEWHERE = {"step", "time_s", "num_steps", "loss", "samples", "tokens", "samples_seen", "samples_pending"}
ELSEWHERE |= {"epoch", "fill"}
_CARD = """\
<figure class="chart"><b>{{ title }}</b> <small class="soft">{{ last }}</small>{{ chart }}</figure>"""


def _curves(runs: Sequence[Run], metric: str, unit: Unit) -> list[Curve]:
    curves = []
    for number, run in enumerate(runs):
        points = run.series(metric, unit)
        colour = number % NUM_COLOURS
        if len(points) > SMOOTH_FROM:
            curves.append(Curve(run.name, points, colour, is_faint=True))
        if points:
            curves.append(Curve(run.name, gentle(points), colour))
    return curves


def gentle(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A short series unchanged; of a long series, the mean of each point's neighbourhood."""
    return smoothed(points, len(points) // SMOOTH_PART) if len(points) > SMOOTH_FROM else points


def wide_chart(runs: Sequence[Run], metric: str, unit: Unit) -> Html:
    """One metric over the page's whole width; for a single run, dashed lines mark its events."""
    curves = _curves(runs, metric, unit)
    if not curves:
        has_rows = any(run.training.rows for run in runs)
        reason = "No times were logged: draw it over steps." if has_rows else "Nothing logged yet."
        return absent(reason)
    marks = list(_marks(runs, unit)) if len(runs) == 1 else []
    chart = curve_chart(curves, metric, size=WIDE, unit=unit, marks=marks)
    return fill('<figure class="wide">{{ chart }}</figure>', chart=chart)


def _marks(runs: Sequence[Run], unit: Unit) -> Iterator[tuple[float, str]]:
    for run in runs:
        for event in run.events:
            if event.kind in (*TROUBLE, "resume"):
                if unit == "step":
                    yield event.step, event.text
                elif run.begin_s is not None:
                    yield (event.time_s - run.begin_s) / SECONDS[unit], event.text


def groups(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(heading, metrics): every logged number except those shown elsewhere on the page."""
    names = dict.fromkeys(name for run in runs for row in run.training.rows for name in row)
    found: dict[str, list[str]] = {heading: [] for heading in HEADINGS}
    for name in names:
        if name not in ELSEWHERE and not name.endswith("_share") and "/" not in name.removeprefix("system/"):
            found[_heading(name)].append(name)
    found["Scores"] = list(dict.fromkeys(name for run in runs for name in run.score_names))
    return [(heading, metrics) for heading, metrics in found.items() if metrics]


def _heading(name: str) -> str:
    if name.startswith("system/") or name == "memory_gib":
        return "Machine"
    if name.endswith("_per_s") or name in ("step_s", "mfu", "data_wait_s"):
        return "Speed"
    return "Optimisation" if name in ("lr", "grad_norm", "nonfinite_steps") else "Losses and quality"


def charts(runs: Sequence[Run], metrics: Sequence[str], unit: Unit) -> Html:
    """A card for each metric; a metric that was 0 throughout is left out."""
    cards = []
    for metric in metrics:
        curves = _curves(runs, metric, unit)
        values = {value for curve in curves for _, value in curve.points}
        if not values or values == {0.0}:  # nothing happened
            continue
        last = ", ".join(short(curve.points[-1][1]) for curve in curves if not curve.is_faint)
        chart = curve_chart(curves, metric, unit=unit)
        cards.append(fill(_CARD, title=_title(metric), last=last, chart=chart))
    return grid(cards, 280) if cards else together([])


def _title(metric: str) -> str:
    """The metric's title, such as `system/disk_free_gib -> disk free, GiB`."""
    name = metric.removeprefix("system/").removesuffix("_per_s")
    ending = next((ending for ending in UNITS if name.endswith(ending)), "")
    text = name.removesuffix(ending).replace("_", " ").replace("/", " ") + UNITS.get(ending, "")
    return text + " / s" if metric.endswith("_per_s") else text
