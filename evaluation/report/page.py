"""Puts the page together: sections of HTML, images inlined as PNG, one file that can be sent to anybody."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine import files
from evaluation.report.charts import bar_chart, line_chart, short
from evaluation.report.gallery import edits, reconstructions, text_to_image
from evaluation.report.inputs import Evaluation, ReportInput, Training, read_report_input
from evaluation.report.style import CSS
from evaluation.report.verdicts import TARGETS, Outcome, outcomes

REPORT_NAME = "report.html"
SUMMARY_NAME = "report.json"
# Logged, but no result of a training; nor is what stands under "system/".
BOOKKEEPING = {"step", "loss", "lr", "nonfinite_steps", "epoch", "time_s", "num_steps"}
ATTRIBUTION = (
    "Emoji graphics: Twemoji, copyright Twitter, Inc and other contributors, licensed under "
    '<a href="https://creativecommons.org/licenses/by/4.0/">CC-BY 4.0</a>; scaled and composed into scenes.'
)


@dataclasses.dataclass(frozen=True)
class Gallery:
    """A section that shows the images of one evaluation."""

    evaluation: str
    title: str
    lead: str
    render: Callable[[Evaluation], str]


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

    Works on a run that has not finished: what is missing is named on the page and is null in the JSON.
    """
    report = read_report_input(root)
    found = outcomes(report)
    files.write_json(root / SUMMARY_NAME, summary(report, found))
    files.write_text(root / REPORT_NAME, page(report, found))
    return root / REPORT_NAME


def summary(report: ReportInput, found: Sequence[Outcome]) -> dict[str, Any]:
    """Everything a machine may want: targets, scores, durations, last logged numbers, environment."""
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
        shown = evaluation is not None and evaluation.images is not None
        body = gallery.render(evaluation) if evaluation and shown else _absent("No images yet.")
        sections.append(_section(gallery.title, body, gallery.lead))
    sections += [
        _section("Scores by category", _scores(report)),
        _section("Training", _trainings(report.trainings), "Loss over steps, as logged."),
        _section("Time", _durations(report)),
        _section("Environment", _environment(report)),
        _section("Attribution", f"<p>{ATTRIBUTION}</p>"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>RPiAE: a run from images to editing</title><style>{CSS}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str, lead: str = "") -> str:
    introduction = f'<p class="soft">{lead}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{introduction}{body}</section>\n"


def _absent(text: str) -> str:
    return f'<p class="absent">{text}</p>'


def _targets(report: ReportInput, found: Sequence[Outcome]) -> str:
    """Title, what to know first, and the table of targets."""
    rows = []
    for outcome in found:
        sign, kind = {
            True: ("✓ reached", "good"),
            False: ("✗ falls short", "bad"),
            None: ("not yet", "none"),
        }[outcome.passed]
        relation = "≤" if outcome.at_most else "≥"
        rows.append(
            f'<tr><td>{escape(outcome.label)}</td><td class="number">{_measured(outcome)}</td>'
            f'<td class="number">{relation} {_number(outcome.asked, outcome.unit)}</td>'
            f'<td class="badge {kind}">{sign}</td></tr>'
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return (
        "<header><h1>RPiAE, from images to editing</h1>"
        '<p class="lead">Images → tokenizer → latents → text-to-image → editing: '
        "one run, what it made and how good that is.</p>"
        f'<ul class="notes">{notes}</ul></header>'
        '<div class="scroll"><table><thead><tr><th>Target</th><th class="number">Measured</th>'
        '<th class="number">Asked</th><th>Outcome</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Rates come from a small classifier trained apart on real renders; its own accuracy '
        "is the first row. In grey: 95 % confidence interval and number of images.</p>"
    )


def _measured(outcome: Outcome) -> str:
    if outcome.value is None:
        return "–"
    text = f"<b>{_number(outcome.value, outcome.unit)}</b>"
    if outcome.low is None or outcome.high is None:
        return text
    low, high = (_number(bound, outcome.unit) for bound in (outcome.low, outcome.high))
    return f'<span class="range">{low} – {high}, n = {outcome.n} &nbsp;</span>{text}'


def _number(value: float, unit: str = "") -> str:
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def _scores(report: ReportInput) -> str:
    if not report.evaluations:
        return _absent("Nothing was judged yet.")
    order = [target.evaluation for target in TARGETS]
    names = sorted(report.evaluations, key=lambda n: order.index(n) if n in order else len(order))
    return "".join(_score_table(report.evaluations[name]) for name in names)


def _score_table(evaluation: Evaluation) -> str:
    """One table an evaluation: a row for everything and for each group, a column a metric."""
    scores = evaluation.scores
    metrics = list(scores["scores"])
    head = "".join(f'<th class="number">{escape(metric.replace("_", " "))}</th>' for metric in metrics)
    rows = []
    for name, estimates in [("all", scores["scores"]), *scores["groups"].items()]:
        cells = "".join(_cell(estimates.get(metric)) for metric in metrics)
        rows.append(f"<tr><td>{escape(name.replace('_', ' '))}</td>{cells}</tr>")
    notes = [f"{metric}: {found['note']}" for metric, found in scores["scores"].items() if "note" in found]
    footnotes = "".join(f'<p class="soft">{escape(note.replace("_", " "))}</p>' for note in notes)
    partial = f", partial: {scores['n_failed']} images missing" if scores["partial"] else ""
    return (
        f"<h3>{escape(evaluation.name)} ({scores['n']} images{partial})</h3>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div>{footnotes}"
    )


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["mean"] is None:
        return '<td class="number">–</td>'
    value = estimate["mean"]
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f'<td class="number">{text} <small>n = {estimate["n"]}</small></td>'


def _trainings(trainings: Sequence[Training]) -> str:
    cards = []
    for training in trainings:
        points = training.series("loss")
        chart = line_chart(points, f"loss of {training.name}") if points else _absent("nothing logged yet")
        last = {
            name: value
            for name, value in training.last().items()
            if name not in BOOKKEEPING and not name.startswith("system/")
        }
        numbers = ", ".join(
            f"{escape(name.replace('_', ' '))} {short(value)}"
            for name, value in last.items()
            if value is not None
        )
        title = f"<b>{escape(training.name)}</b>"
        caption = f'<figcaption><span class="marks">{numbers}</span></figcaption>'
        cards.append(f'<figure class="chart">{title}{chart}{caption}</figure>')
    if not cards:
        return _absent("No training has logged anything yet.")
    return f'<div class="grid-cards" style="--cell: 300px">{"".join(cards)}</div>'


def _durations(report: ReportInput) -> str:
    if not report.durations:
        return _absent("No step has finished yet.")
    bars = [(name, seconds, _duration(seconds)) for name, seconds in report.durations]
    total = _duration(sum(seconds for _, seconds in report.durations))
    return f"<p>{total} in all.</p>{bar_chart(bars, 'seconds a step')}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _environment(report: ReportInput) -> str:
    facts = {**report.machine, **report.versions}
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"
