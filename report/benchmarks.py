"""One page of benchmark scores: runs beside the paper's tables and each other, and failed items with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base import files
from base.config import UserError
from data.image_set import Item
from evaluation.runner import SCORES_NAME
from report.comparison import paired
from report.gallery import grid, strip
from report.markup import Html, absent, document, facts, fill, section, together
from report.paper_tables import TABLES, Column, PaperTable
from report.run_contents import Evaluation, read_evaluation
from report.style import CSS

MAX_FAILED = 60  # failed items shown of each suite and run, the first in manifest order
MAX_ANSWER_CHARACTERS = 400
FAILED_BELOW = {"rating": 2.0, "o": 3.0, "image_score": 50.0}  # an item below its number is shown as failed
ROLES = ("source", "original", "result")
STYLE = """
td.ours { background: color-mix(in srgb, var(--accent) 9%, transparent); }
tr.ours td { font-weight: 600; }
tr.ours .range { font-weight: 400; }
figcaption .answer { display: block; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; padding-top: 4px; }
details summary { cursor: pointer; color: var(--accent); margin: 10px 0; }
.range { white-space: nowrap; }
"""
_HEAD = """\
<header><h1>Scores</h1><p class="lead">{{ names }}</p><p class="soft">95 % confidence intervals in grey. \
The paper's rows: RPiAE, Tables 3, 4, 5, 8 and 9. Numbers compare only where protocol, judge and reference are the \
same; both stand at the end.</p></header>"""
_PAPER = """\
<h3>{{ table.title }}</h3><div class="scroll"><table><thead><tr><th></th>
{% for column in table.columns %}
<th class="number">{{ column.label }} {{ "↓" if column.less_is_better else "↑" }}</th>
{% endfor %}
</tr></thead><tbody>
{% for name, values in rows %}
<tr><td>{{ name }}</td>{% for value in values %}<td class="number">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
{% for name, cells in ours %}
<tr class="ours"><td class="ours">{{ name }}</td>
{% for value, interval in cells %}
<td class="number ours">{{ value }}{% if interval %}<br><span class="range">{{ interval }}</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}"""
_ALL = """\
<div class="scroll"><table><thead><tr><th>Suite</th><th>Metric</th><th>Group</th>
{% for name in names %}<th class="number">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for labels, cells in rows %}
<tr>{% for label in labels %}<td>{{ label }}</td>{% endfor %}

{% for value, interval, n in cells %}
<td class="number ours">{{ value }}{% if interval %} <span class="range">{{ interval }}</span>{% endif %}
{% if n is not none %} <small>n = {{ n }}</small>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>"""
_PAIRED = """\
<div class="scroll"><table><thead><tr><th>{{ first }} against</th><th>Suite</th><th>Metric</th>
{% for name in ("both right", "only " ~ first, "only the other", "neither", "p, if they were equal") %}
<th class="number">{{ name }}</th>
{% endfor %}
</tr></thead><tbody>
{% for name, one in rows %}
<tr><td>{{ name }}</td><td>{{ one.suite }}</td><td>{{ one.metric }}</td>
{% for n in (one.both, one.only_first, one.only_second, one.neither, "%.2g" | format(one.p_value)) %}
<td class="number">{{ n }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>"""
_FOLDED = "<details><summary>{{ title }}</summary>{{ body }}</details>"
_CARD = """\
<figure>{{ strip }}<figcaption>{{ text }}<span class="marks">{{ values }}</span>
{%- for reason in reasons %}<span class="answer">{{ reason }}</span>{% endfor -%}
</figcaption></figure>"""


@dataclass(frozen=True)
class Run:
    """A run folder and all its scores."""

    name: str
    evaluations: tuple[Evaluation, ...]  # ordered by the path of their scores


def read_run(folder: Path, images: Sequence[Path] = ()) -> Run:
    """Reads every scores.json in the folder or below it; `images`: folders elsewhere that may be shown.

    Raises UserError: no scores.json.
    """
    paths = sorted(folder.rglob(SCORES_NAME))
    if not paths:
        raise UserError(f"{folder}: no {SCORES_NAME} in or below it; score a set of images first")
    return Run(folder.resolve().name, tuple(read_evaluation(path, [folder, *images]) for path in paths))


def render_benchmarks(
    folders: Sequence[Path], out: Path, max_failed: int = MAX_FAILED, images: Sequence[Path] = ()
) -> Path:
    """Writes the page, with the images of at most `max_failed` failed items of each suite; `images`: as read_run.

    Raises UserError as read_run and base.files.write_page.
    """
    files.write_page(out, page([read_run(folder, images) for folder in folders], max_failed))
    return out


def page(runs: Sequence[Run], max_failed: int = MAX_FAILED) -> str:
    """The whole HTML document."""
    names = ", ".join(run.name for run in runs)
    tables = [text for table in TABLES for text in [_paper_table(table, runs)] if text]
    body = [
        fill(_HEAD, names=names),
        section("Beside the paper", together(tables) if tables else absent("No score of its tables yet.")),
        section("Every score", _all_scores(runs)),
        *([section("Item by item", _item_by_item(runs))] if len(runs) > 1 else []),
        *(section(f"Failed: {run.name}", _failed(run, max_failed)) for run in runs),
        section("Protocols", together(_protocol(run, one) for run in runs for one in run.evaluations)),
    ]
    return document(f"Scores: {names}", CSS + STYLE, together(body))


def find(run: Run, column: Column) -> Mapping[str, Any] | None:
    """The run's number for a column, from the first evaluation that has it; None without one."""
    for evaluation in run.evaluations:
        scores = evaluation.scores
        if scores["suite"] == column.suite and (not column.beside or column.beside in scores["scores"]):
            table = scores["scores"] if column.group is None else scores["groups"].get(column.group, {})
            for metric, found in table.items():
                is_it = (
                    metric.startswith(column.metric)
                    if column.metric.endswith("_")
                    else metric == column.metric
                )
                if is_it and found["mean"] is not None:
                    return {**found, "metric": metric, "partial": scores["partial"]}
    return None


def _paper_table(table: PaperTable, runs: Sequence[Run]) -> Html | None:
    """The paper's table with a row for each run; None if no run has a number of its columns."""
    ours = [(run, [find(run, column) for column in table.columns]) for run in runs]
    ours = [(run, cells) for run, cells in ours if any(cells)]
    if not ours:
        return None
    rows = [(name, list(map(_plain, values, table.columns))) for name, values in table.rows]
    notes = [table.note] if table.note else []
    for run, cells in ours:
        for column, cell in zip(table.columns, cells, strict=True):
            if cell is not None and (cell.get("note") or cell["partial"] or cell["metric"] != column.metric):
                partial = "partial; " if cell["partial"] else ""
                note = f"{run.name}, {column.label} is {cell['metric']}: {partial}{cell.get('note', '')}"
                notes.append(note.rstrip(": "))
    texts = [(run.name, list(map(_beside, cells, table.columns))) for run, cells in ours]
    return fill(_PAPER, table=table, rows=rows, ours=texts, notes=notes)


def _all_scores(runs: Sequence[Run]) -> Html:
    """A table with a row for every suite, metric and group, and a column for each run."""
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            scores = evaluation.scores
            for group, table in [("", scores["scores"]), *scores["groups"].items()]:
                for metric, found in table.items():
                    rows.setdefault((scores["suite"], metric, group), {}).setdefault(run.name, found)
    names = [run.name for run in runs]
    cells = [
        (labels, [_measured(found.get(name)) for name in names]) for labels, found in sorted(rows.items())
    ]
    return fill(_ALL, names=names, rows=cells)


def _item_by_item(runs: Sequence[Run]) -> Html:
    """The first run against each other run, on the items that both have scores of."""
    rows = [(run.name, one) for run in runs[1:] for one in paired(runs[0].evaluations, run.evaluations)]
    if not rows:
        return absent("No items that two runs were scored on.")
    return fill(_PAIRED, first=runs[0].name, rows=rows)


def failed_items(evaluation: Evaluation) -> list[Item]:
    """Items with a wrong or unreadable answer, or with a number that is low on its scale."""
    found = []
    for item in evaluation.images.items if evaluation.images else ():
        line = evaluation.per_item.get(item.key)
        if line is not None and any(_is_failure(name, value) for name, value in line["values"].items()):
            found.append(item)
    return found


def _is_failure(name: str, value: Any) -> bool:
    if name in ("unparseable", "refused"):
        return any(value) if isinstance(value, list) else bool(value)
    if isinstance(value, bool):
        return not value
    return name in FAILED_BELOW and value is not None and value < FAILED_BELOW[name]


def _failed(run: Run, max_failed: int) -> Html:
    parts = []
    for evaluation in run.evaluations:
        if evaluation.hidden:
            shows = f"to show them, add --images {evaluation.hidden}"
            parts.append(absent(f"{evaluation.scores['suite']}: its images are elsewhere; {shows}"))
        items = failed_items(evaluation)
        if not items:
            continue
        cards = [_card(evaluation, item) for item in items[:max_failed]]
        shown = f", the first {len(cards)} shown" if len(cards) < len(items) else ""
        title = f"{evaluation.scores['suite']}: {len(items)} of {evaluation.scores['n']} items{shown}"
        parts.append(fill(_FOLDED, title=title, body=grid(cards, 284)))
    return together(parts) if parts else absent("Nothing failed, or the images are gone.")


def _card(evaluation: Evaluation, item: Item) -> Html:
    line = evaluation.per_item[item.key]
    text = str(
        item.meta.get("prompt") or item.meta.get("instruction") or item.meta.get("item_id") or item.key
    )
    detail = line["detail"]
    reasons = [*detail.get("reasons", ()), *detail.get("failed", ()), *detail.get("answers", ())]
    return fill(
        _CARD,
        strip=strip(evaluation, item, [(role, role) for role in ROLES if role in item.images]),
        text=text[:MAX_ANSWER_CHARACTERS],
        values=", ".join(f"{name} {_short(value)}" for name, value in line["values"].items()),
        reasons=[str(reason)[:MAX_ANSWER_CHARACTERS] for reason in reasons],
    )


def _protocol(run: Run, evaluation: Evaluation) -> Html:
    scores = evaluation.scores
    found = {
        **_flat(scores.get("protocol", {})),
        **{f"hash of {k}": v[:16] for k, v in scores.get("fingerprints", {}).items()},
    }
    found["images"] = f"{scores['n']}, {scores['n_failed']} missing; seed {scores.get('seed', '–')}"
    found["versions"] = ", ".join(f"{name} {number}" for name, number in scores.get("versions", {}).items())
    title = f"{run.name}: {scores['suite']}"
    return fill(_FOLDED, title=title, body=facts(found.items()))


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(
            _flat(value, f"{before}{name}: ") if isinstance(value, Mapping) else {f"{before}{name}": value}
        )
    return found


def _plain(value: float | None, column: Column) -> str:
    return "–" if value is None else f"{value:.{column.digits}f}"


def _beside(cell: Mapping[str, Any] | None, column: Column) -> tuple[str, str]:
    """A run's number in the paper's digits, and its interval."""
    if cell is None:
        return "–", ""
    mean, low, high = (
        None if cell[name] is None else f"{column.scale * cell[name]:.{column.digits}f}"
        for name in ("mean", "low", "high")
    )
    return str(mean), "" if low is None else f"{low} – {high}"


def _measured(cell: Mapping[str, Any] | None) -> tuple[str, str, int | None]:
    """Value, interval and number of items of a score."""
    if cell is None or cell["mean"] is None:
        return "–", "", None
    low, high = cell["low"], cell["high"]
    interval = "" if low is None or high is None else f"{low:.3g} – {high:.3g}"
    return f"{cell['mean']:.4g}", interval, cell["n"]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{sum(map(bool, value))} of {len(value)}"
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
