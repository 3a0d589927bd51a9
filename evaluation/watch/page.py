"""Trainings as one self-contained HTML page: status, curves on the same axes, samples, events, configs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from evaluation.report.charts import bar_chart, stacked_bar
from evaluation.report.style import CSS
from evaluation.watch.curves import SMOOTH_FROM, charts, groups, wide_chart
from evaluation.watch.records import configs, events_table, key, samples, table
from evaluation.watch.run import TROUBLE, Over, Run, unit_of
from evaluation.watch.status import facts, state_text

STATE_KIND = {"running": "good", "finished": "good", "silent": "bad", "stopped": "bad", "waiting": "none"}
STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 18px 0; }
.tiles small { display: block; color: var(--soft); font-size: 13px; }
figure.wide { padding: 14px 14px 10px; }
figure.wide svg text { font-size: 11px; }
.status td { white-space: nowrap; } .status td:first-child { font-weight: 600; }
td.text { overflow-wrap: anywhere; } td.config { font-size: 13px; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
.time { margin: 10px 0 18px; } .time b { font-size: 14px; }
figure.grid img { image-rendering: auto; width: 100%; height: auto; }
"""


def page(runs: Sequence[Run], *, now_s: float, over: Over = "step", refresh_s: float | None = None) -> str:
    """The whole HTML document. `refresh_s`: a browser loads it again after so many seconds."""
    title = " · ".join(run.name for run in runs)
    unit = unit_of(runs, over)
    loss = wide_chart(runs, "loss", unit)
    sections = [
        f'<header><h1>{escape(title)}</h1><p class="lead">{_lead(runs, now_s)}</p></header>{_status(runs, now_s)}',
        _section("Loss", _legend(runs) + loss, _reading(runs)),
        *(_section(name, charts(runs, metrics, unit)) for name, metrics in groups(runs)),
        _section(
            "Where the time goes", _shares(runs), "Of the wall time of late. In grey: none of these parts."
        ),
        _section("Data", _data(runs)),
        _section("Samples", samples(runs), "Drawn with the averaged weights, oldest first."),
        _section("Events", events_table(runs)),
        _section("Config" if len(runs) == 1 else "Configs: what differs", configs(runs)),
    ]
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:g}">' if refresh_s else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{STYLE}</style></head>\n<body>{''.join(sections)}</body></html>\n"
    )


def _section(title: str, body: str, lead: str = "") -> str:
    """Nothing, if there is nothing to show."""
    introduction = f'<p class="soft">{lead}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{introduction}{body}</section>\n" if body else ""


def _lead(runs: Sequence[Run], now_s: float) -> str:
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(now_s))
    if len(runs) == 1:
        run = runs[0]
        return (
            f'<span class="{STATE_KIND[run.state(now_s)]}">{escape(state_text(run, now_s).capitalize())}</span> '
            f"· {escape(str(run.path))} · as of {when}"
        )
    return f"{len(runs)} runs compared, as of {when}"


def _status(runs: Sequence[Run], now_s: float) -> str:
    """One run: its facts side by side; several: a table with a row a run."""
    if len(runs) == 1:
        tiles = [
            f"<div><small>{escape(name)}</small>{escape(value)}</div>"
            for name, value in facts(runs[0], now_s)
        ]
        return f'<div class="tiles">{"".join(tiles)}</div>'
    known = [dict(facts(run, now_s)) for run in runs]
    names = list(dict.fromkeys(name for found in known for name in found))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for number, (run, found) in enumerate(zip(runs, known, strict=True)):
        cells = "".join(f"<td>{escape(found.get(name, '–'))}</td>" for name in names)
        state = f'<td class="{STATE_KIND[run.state(now_s)]}">{escape(state_text(run, now_s))}</td>'
        rows.append(f"<tr><td>{key(number)}{escape(run.name)}</td>{state}{cells}</tr>")
    return f'<div class="scroll">{table(f"<th>run</th><th>state</th>{head}", rows, "status")}</div>'


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    names = "".join(f"<span>{key(number)}{escape(run.name)}</span>" for number, run in enumerate(runs))
    return f'<p class="legend">{names}</p>'


def _reading(runs: Sequence[Run]) -> str:
    """How to read the curves; only what is there."""
    parts = []
    if any(len(run.training.rows) > SMOOTH_FROM for run in runs):
        parts.append("Faint: each log interval; strong: the mean of its neighbourhood.")
    if len(runs) == 1 and runs[0].count(*TROUBLE, "resume"):
        parts.append("Dashed: a resume, an alarm, a roll-back or a step that was not taken.")
    return " ".join(parts)


def _shares(runs: Sequence[Run]) -> str:
    bars = []
    for run in runs:
        if shares := run.shares():
            title = f"<b>{escape(run.name)}</b>" if len(runs) > 1 else ""
            names = "".join(
                f"<span>{key(number)}{escape(name)} {share:.1%}</span>"
                for number, (name, share) in enumerate(shares.items())
            )
            bar = stacked_bar(list(shares.items()), f"time of {run.name}")
            bars.append(f'<div class="time">{title}{bar}<p class="legend">{names}</p></div>')
    return "".join(bars)


def _data(runs: Sequence[Run]) -> str:
    """What was read, and how much of it from each set of a mixture."""
    parts = []
    for run in runs:
        last = run.training.last()
        told = [
            ("samples seen", last.get("samples_seen")),
            ("epoch", last.get("epoch")),
            ("fill", run.recent("fill")),
        ]
        text = " · ".join(
            f"{name} {value:,.4g}" if value < 1e4 else f"{name} {value:,.0f}" for name, value in told if value
        )
        names = sorted({name for row in run.training.rows for name in row if name.startswith("samples/")})
        names = [name for name in names if not name.endswith("_per_s")]
        counts = {name.partition("/")[2]: sum(v for _, v in run.training.series(name)) for name in names}
        total = sum(counts.values()) or 1.0
        bars = [(name, count, f"{count / total:.1%}, {count:,.0f} samples") for name, count in counts.items()]
        title = f"<b>{escape(run.name)}</b> " if len(runs) > 1 else ""
        if text or bars:
            parts.append(f"<p>{title}{text}</p>{bar_chart(bars, 'samples by set') if bars else ''}")
    return "".join(parts)
