"""Puts the page together: sections of HTML, images inlined as PNG, one file to send to anybody."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files
from report.charts import bar_chart, line_chart, short
from report.gallery import edits, grid, reconstructions, text_to_image
from report.markup import Html, absent, document, facts, fill, section, together
from report.run_contents import Evaluation, ReportInput, Training, read_report_input
from report.style import CSS
from report.verdicts import TARGETS, Outcome, outcomes

REPORT_NAME = "report.html"
SUMMARY_NAME = "report.json"
# Logged numbers that are no results of a training; nor is anything under "system/".
BOOKKEEPING = {"step", "loss", "lr", "nonfinite_steps", "epoch", "time_s", "num_steps"}
ATTRIBUTION = """\
<p>Emoji graphics: Twemoji, copyright Twitter, Inc and other contributors, licensed under \
<a href="https://creativecommons.org/licenses/by/4.0/">CC-BY 4.0</a>; scaled and composed into scenes.</p>"""
_HEAD = """\
<header><h1>RPiAE, from images to editing</h1>
<p class="lead">Images → tokenizer → latents → text-to-image → editing: one run, what it made and how good that is.</p>
<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul></header>
<div class="scroll"><table><thead><tr><th>Target</th><th class="number">Measured</th>
<th class="number">Asked</th><th>Outcome</th></tr></thead><tbody>
{% for one, sign, kind, interval, value, asked in targets %}
<tr><td>{{ one.label }}</td><td class="number">
{%- if interval %}<span class="range">{{ interval }} &nbsp;</span>{% endif -%}
{% if value %}<b>{{ value }}</b>{% else %}–{% endif %}</td>
<td class="number">{{ "≤" if one.at_most else "≥" }} {{ asked }}</td><td class="badge {{ kind }}">{{ sign }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Rates come from a small classifier trained apart on real renders; its own accuracy \
is the first row. In grey: 95 % confidence interval and number of images.</p>"""
_SCORES = """\
<h3>{{ title }}</h3>
<div class="scroll"><table><thead><tr><th></th>
{% for metric in metrics %}<th class="number">{{ metric }}</th>{% endfor %}</tr></thead><tbody>
{% for name, cells in rows %}
<tr><td>{{ name }}</td>
{% for value, n in cells %}
<td class="number">{% if value %}{{ value }} <small>n = {{ n }}</small>{% else %}–{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}"""
_TRAINING = """\
<figure class="chart"><b>{{ name }}</b>{{ chart }}\
<figcaption><span class="marks">{{ numbers }}</span></figcaption></figure>"""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A section that shows the images of one evaluation."""

    evaluation: str
    title: str
    lead: str
    render: Callable[[Evaluation], Html]


GALLERIES = (
    Gallery(
        "reconstruction",
        "Reconstructions",
        "Validation images, and what the autoencoder makes of their latents.",
        reconstructions,
    ),
    Gallery(
        "t2i",
        "Text-to-image",
        "Drawn from captions whose combination of things the model never saw in training.",
        text_to_image,
    ),
    Gallery("edit", "Editing", "A validation image, an instruction, and the result.", edits),
)


def render_report(root: Path) -> Path:
    """Writes `root`/report.html and report.json from what the run folder holds; returns the page's path.

    The run may be unfinished: the page names what is missing, and the JSON has null there.
    """
    report = read_report_input(root)
    found = outcomes(report)
    files.write_json(root / SUMMARY_NAME, summary(report, found))
    files.write_text(root / REPORT_NAME, page(report, found))
    return root / REPORT_NAME


def summary(report: ReportInput, found: Sequence[Outcome]) -> dict[str, Any]:
    """The report for machines: targets, scores, durations, last logged numbers, environment."""
    return {
        "targets": [{**dataclasses.asdict(outcome), "passed": outcome.passed} for outcome in found],
        "scores": {name: dict(evaluation.scores) for name, evaluation in report.evaluations.items()},
        "durations": [{"name": name, "seconds": seconds} for name, seconds in report.durations],
        "trainings": {training.name: training.last() for training in report.trainings},
        "notes": list(report.notes),
        "machine": dict(report.machine),
        "versions": dict(report.versions),
    }


def page(report: ReportInput, found: Sequence[Outcome]) -> str:
    """The whole HTML document."""
    sections = [_targets(report, found)]
    for gallery in GALLERIES:
        evaluation = report.evaluations.get(gallery.evaluation)
        if evaluation is None or evaluation.images is None:
            hidden = evaluation.hidden if evaluation else ""
            body = absent(f"Its images are outside the run folder: {hidden}" if hidden else "No images yet.")
        else:
            body = gallery.render(evaluation)
        sections.append(section(gallery.title, body, gallery.lead))
    sections += [
        section("Scores by category", _scores(report)),
        section("Training", _trainings(report.trainings), "Loss over steps, as logged."),
        section("Time", _durations(report)),
        section("Environment", facts({**report.machine, **report.versions}.items())),
        section("Attribution", fill(ATTRIBUTION)),
    ]
    return document("RPiAE: a run from images to editing", CSS, together(sections))


def _targets(report: ReportInput, found: Sequence[Outcome]) -> Html:
    """Title, opening notes, and the table of targets."""
    signs = {True: ("✓ reached", "good"), False: ("✗ falls short", "bad"), None: ("not yet", "none")}
    targets = []
    for one in found:
        value = "" if one.value is None else _number(one.value, one.unit)
        interval = ""
        if value and one.low is not None and one.high is not None:
            interval = f"{_number(one.low, one.unit)} – {_number(one.high, one.unit)}, n = {one.n}"
        targets.append((one, *signs[one.passed], interval, value, _number(one.asked, one.unit)))
    return fill(_HEAD, notes=report.notes, targets=targets)


def _number(value: float, unit: str = "") -> str:
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def _scores(report: ReportInput) -> Html:
    if not report.evaluations:
        return absent("Nothing was judged yet.")
    order = [target.evaluation for target in TARGETS]
    names = sorted(report.evaluations, key=lambda n: order.index(n) if n in order else len(order))
    return together(_score_table(report.evaluations[name]) for name in names)


def _score_table(evaluation: Evaluation) -> Html:
    """One table for each evaluation: a row for all items and for each group, a column for each metric."""
    scores = evaluation.scores
    metrics = list(scores["scores"])
    partial = f", partial: {scores['n_failed']} images missing" if scores["partial"] else ""
    return fill(
        _SCORES,
        title=f"{evaluation.name} ({scores['n']} images{partial})",
        metrics=[metric.replace("_", " ") for metric in metrics],
        rows=[
            (name.replace("_", " "), [_cell(estimates.get(metric)) for metric in metrics])
            for name, estimates in [("all", scores["scores"]), *scores["groups"].items()]
        ],
        notes=[
            f"{metric}: {found['note']}".replace("_", " ")
            for metric, found in scores["scores"].items()
            if "note" in found
        ],
    )


def _cell(estimate: Mapping[str, Any] | None) -> tuple[str, int]:
    """Value ("" without one) and number of items."""
    if estimate is None or estimate["mean"] is None:
        return "", 0
    value = estimate["mean"]
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}", estimate["n"]


def _trainings(trainings: Sequence[Training]) -> Html:
    cards = []
    for training in trainings:
        points = training.series("loss")
        chart = line_chart(points, f"loss of {training.name}") if points else absent("nothing logged yet")
        numbers = ", ".join(
            f"{name.replace('_', ' ')} {short(value)}"
            for name, value in training.last().items()
            if name not in BOOKKEEPING and not name.startswith("system/") and value is not None
        )
        cards.append(fill(_TRAINING, name=training.name, chart=chart, numbers=numbers))
    return grid(cards, 300) if cards else absent("No training has logged anything yet.")


def _durations(report: ReportInput) -> Html:
    if not report.durations:
        return absent("No step has finished yet.")
    bars = [(name, seconds, _duration(seconds)) for name, seconds in report.durations]
    total = _duration(sum(seconds for _, seconds in report.durations))
    chart = bar_chart(bars, "seconds a step")
    return fill("<p>{{ total }} in all.</p>{{ chart }}", total=total, chart=chart)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
