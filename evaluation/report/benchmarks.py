"""One page of benchmark scores: runs beside the paper's tables and beside each other, and what failed, with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from engine import files
from engine.config import UserError
from evaluation.manifest import Item
from evaluation.report.comparison import paired
from evaluation.report.gallery import grid, strip
from evaluation.report.inputs import Evaluation, read_evaluation
from evaluation.report.paper_tables import TABLES, Column, PaperTable
from evaluation.report.style import CSS
from evaluation.runner import SCORES_NAME

MAX_FAILED = 60  # shown of each suite and run, the first in manifest order
MAX_ANSWER_CHARACTERS = 400
FAILED_BELOW = {"rating": 2.0, "o": 3.0, "image_score": 50.0}  # numbers at which an item is shown as failed
ROLES = ("source", "original", "result")
STYLE = """
td.ours { background: color-mix(in srgb, var(--accent) 9%, transparent); }
tr.ours td { font-weight: 600; }
tr.ours .range { font-weight: 400; }
figcaption .answer { display: block; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; padding-top: 4px; }
details summary { cursor: pointer; color: var(--accent); margin: 10px 0; }
.range { white-space: nowrap; }
"""


@dataclass(frozen=True)
class Run:
    """A folder and all it was scored on."""

    name: str
    evaluations: tuple[Evaluation, ...]  # by the path of their scores


def read_run(folder: Path) -> Run:
    """Every scores.json in the folder or below it. Raises UserError: none."""
    paths = sorted(folder.rglob(SCORES_NAME))
    if not paths:
        raise UserError(f"{folder}: no {SCORES_NAME} in or below it; score a set of images first")
    return Run(folder.resolve().name, tuple(read_evaluation(path) for path in paths))


def render_benchmarks(folders: Sequence[Path], out: Path, max_failed: int = MAX_FAILED) -> Path:
    """Writes the page, with the images of at most `max_failed` failed items of each suite.

    Raises UserError as read_run and engine.files.write_page.
    """
    files.write_page(out, page([read_run(folder) for folder in folders], max_failed))
    return out


def page(runs: Sequence[Run], max_failed: int = MAX_FAILED) -> str:
    """The whole HTML document."""
    names = ", ".join(run.name for run in runs)
    tables = [text for table in TABLES for text in [_paper_table(table, runs)] if text]
    body = [
        f'<header><h1>Scores</h1><p class="lead">{escape(names)}</p>'
        '<p class="soft">95 % confidence intervals in grey. The paper\'s rows: RPiAE, Tables 3, 4, 5, 8 and 9. Numbers '
        "compare only where protocol, judge and reference are the same; both stand at the end.</p></header>",
        _section("Beside the paper", "".join(tables) or '<p class="absent">No score of its tables yet.</p>'),
        _section("Every score", _all_scores(runs)),
        _section("Item by item", _item_by_item(runs)) if len(runs) > 1 else "",
        *(_section(f"Failed: {escape(run.name)}", _failed(run, max_failed)) for run in runs),
        _section("Protocols", "".join(_protocol(run, one) for run in runs for one in run.evaluations)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Scores: {escape(names)}</title><style>{CSS}{STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def find(run: Run, column: Column) -> Mapping[str, Any] | None:
    """The run's number for a column: of the first evaluation that has it."""
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


def _paper_table(table: PaperTable, runs: Sequence[Run]) -> str:
    """ "" when no run has a number of its columns."""
    ours = [(run, [find(run, column) for column in table.columns]) for run in runs]
    ours = [(run, cells) for run, cells in ours if any(cells)]
    if not ours:
        return ""
    head = "".join(
        f'<th class="number">{escape(column.label)} {"↓" if column.less_is_better else "↑"}</th>'
        for column in table.columns
    )
    rows = [
        f"<tr><td>{escape(name)}</td>{''.join(map(_plain, values, table.columns))}</tr>"
        for name, values in table.rows
    ]
    notes = [table.note] if table.note else []
    for run, cells in ours:
        texts = [_beside(cell, column) for cell, column in zip(cells, table.columns, strict=True)]
        rows.append(f'<tr class="ours"><td class="ours">{escape(run.name)}</td>{"".join(texts)}</tr>')
        for column, cell in zip(table.columns, cells, strict=True):
            if cell is not None and (cell.get("note") or cell["partial"] or cell["metric"] != column.metric):
                partial = "partial; " if cell["partial"] else ""
                notes.append(
                    f"{run.name}, {column.label} is {cell['metric']}: {partial}{cell.get('note', '')}".rstrip(
                        ": "
                    )
                )
    lines = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{lines}"
    )


def _all_scores(runs: Sequence[Run]) -> str:
    """A row for every suite, metric and group; a column a run."""
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for evaluation in run.evaluations:
            scores = evaluation.scores
            for group, table in [("", scores["scores"]), *scores["groups"].items()]:
                for metric, found in table.items():
                    rows.setdefault((scores["suite"], metric, group), {}).setdefault(run.name, found)
    head = "".join(f'<th class="number">{escape(run.name)}</th>' for run in runs)
    lines = [
        f"<tr><td>{escape(suite)}</td><td>{escape(metric)}</td><td>{escape(group)}</td>"
        + "".join(_measured(found.get(run.name)) for run in runs)
        + "</tr>"
        for (suite, metric, group), found in sorted(rows.items())
    ]
    return (
        '<div class="scroll"><table><thead><tr><th>Suite</th><th>Metric</th><th>Group</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _item_by_item(runs: Sequence[Run]) -> str:
    """The first run against each other one, on the items that both were scored on."""
    rows = [
        f"<tr><td>{escape(run.name)}</td><td>{escape(one.suite)}</td><td>{escape(one.metric)}</td>"
        + "".join(
            f'<td class="number">{n}</td>' for n in (one.both, one.only_first, one.only_second, one.neither)
        )
        + f'<td class="number">{one.p_value:.2g}</td></tr>'
        for run in runs[1:]
        for one in paired(runs[0].evaluations, run.evaluations)
    ]
    if not rows:
        return '<p class="absent">No items that two runs were scored on.</p>'
    first = escape(runs[0].name)
    numbers = ("both right", f"only {first}", "only the other", "neither", "p, if they were equal")
    head = "".join(f'<th class="number">{name}</th>' for name in numbers)
    return (
        f'<div class="scroll"><table><thead><tr><th>{first} against</th><th>Suite</th><th>Metric</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def failed_items(evaluation: Evaluation) -> list[Item]:
    """Items with a wrong or unreadable answer, or a number that is low on its scale."""
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


def _failed(run: Run, max_failed: int) -> str:
    parts = []
    for evaluation in run.evaluations:
        items = failed_items(evaluation)
        if not items:
            continue
        cards = [_card(evaluation, item) for item in items[:max_failed]]
        shown = f", the first {len(cards)} shown" if len(cards) < len(items) else ""
        suite, n = escape(str(evaluation.scores["suite"])), evaluation.scores["n"]
        title = f"{suite}: {len(items)} of {n} items{shown}"
        parts.append(f"<details><summary>{title}</summary>{grid(cards, 284)}</details>")
    return "".join(parts) or '<p class="absent">Nothing failed, or the images are gone.</p>'


def _card(evaluation: Evaluation, item: Item) -> str:
    line = evaluation.per_item[item.key]
    text = str(
        item.meta.get("prompt") or item.meta.get("instruction") or item.meta.get("item_id") or item.key
    )
    values = ", ".join(f"{name} {_short(value)}" for name, value in line["values"].items())
    detail = line["detail"]
    reasons = [*detail.get("reasons", ()), *detail.get("failed", ()), *detail.get("answers", ())]
    said = "".join(
        f'<span class="answer">{escape(str(reason)[:MAX_ANSWER_CHARACTERS])}</span>' for reason in reasons
    )
    roles = [(role, role) for role in ROLES if role in item.images]
    return (
        f"<figure>{strip(evaluation, item, roles)}<figcaption>{escape(text[:MAX_ANSWER_CHARACTERS])}"
        f'<span class="marks">{escape(values)}</span>{said}</figcaption></figure>'
    )


def _protocol(run: Run, evaluation: Evaluation) -> str:
    scores = evaluation.scores
    facts = {
        **_flat(scores["protocol"]),
        **{f"hash of {k}": v[:16] for k, v in scores["fingerprints"].items()},
    }
    facts["images"] = f"{scores['n']}, {scores['n_failed']} missing; seed {scores['seed']}"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in scores["versions"].items())
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<details><summary>{escape(run.name)}: {escape(str(scores['suite']))}</summary><dl>{listed}</dl></details>"


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(
            _flat(value, f"{before}{name}: ") if isinstance(value, Mapping) else {f"{before}{name}": value}
        )
    return found


def _plain(value: float | None, column: Column) -> str:
    return f'<td class="number">{"–" if value is None else f"{value:.{column.digits}f}"}</td>'


def _beside(cell: Mapping[str, Any] | None, column: Column) -> str:
    """A run's number in the paper's digits, its interval below."""
    if cell is None:
        return '<td class="number ours">–</td>'
    mean, low, high = (
        None if cell[name] is None else f"{column.scale * cell[name]:.{column.digits}f}"
        for name in ("mean", "low", "high")
    )
    interval = "" if low is None else f'<br><span class="range">{low} – {high}</span>'
    return f'<td class="number ours">{mean}{interval}</td>'


def _measured(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["mean"] is None:
        return '<td class="number ours">–</td>'
    low, high = cell["low"], cell["high"]
    interval = "" if low is None else f' <span class="range">{low:.3g} – {high:.3g}</span>'
    return f'<td class="number ours">{cell["mean"]:.4g}{interval} <small>n = {cell["n"]}</small></td>'


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{sum(map(bool, value))} of {len(value)}"
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"
