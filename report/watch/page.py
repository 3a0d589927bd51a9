"""Trainings as one self-contained HTML page: status, curves on shared axes, samples, events, configs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from report.charts import NUM_COLOURS, bar_chart, stacked_bar
from report.markup import Html, document, fill, section, together
from report.style import CSS
from report.watch.curves import SMOOTH_FROM, charts, groups, wide_chart
from report.watch.records import configs, events_table, samples
from report.watch.run import TROUBLE, Over, Run, unit_of
from report.watch.status import facts, state_text

STATE_KIND = {"running": "good", "finished": "good", "silent": "bad", "stopped": "bad", "waiting": "none"}
STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 18px 0; }
.tiles small { display: block; color: var(--soft); font-size: 13px; }
figure.wide { padding: 14px 14px 10px; }
.status td { white-space: nowrap; } .status td:first-child { font-weight: 600; }
td.text { overflow-wrap: anywhere; } td.config { font-size: 13px; overflow-wrap: anywhere; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--soft); }
.time { margin: 10px 0 18px; } .time b { font-size: 14px; }
figure.grid img { image-rendering: auto; width: 100%; height: auto; }
"""
_HEAD = """\
<header><h1>{{ title }}</h1><p class="lead">
{%- if run %}<span class="{{ kind }}">{{ state }}</span> · {{ run.path }} · as of {{ when }}
{%- else %}{{ num_runs }} runs compared, as of {{ when }}{% endif %}</p></header>"""
_TILES = """\
<div class="tiles">{% for name, value in facts %}<div><small>{{ name }}</small>{{ value }}</div>{% endfor %}</div>"""
_STATUS = """\
<div class="scroll"><table class="status"><thead><tr><th>run</th><th>state</th>
{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, kind, state, found in rows %}
<tr><td><i class="key k{{ loop.index0 % num_colours }}"></i>{{ name }}</td><td class="{{ kind }}">{{ state }}</td>
{% for name in names %}<td>{{ found.get(name, "–") }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""
_LEGEND = """\
<p class="legend">{% for name in names %}<span><i class="key k{{ loop.index0 % num_colours }}"></i>{{ name }}</span>\
{% endfor %}</p>"""
_SHARES = '<div class="time">{% if name %}<b>{{ name }}</b>{% endif %}{{ bar }}{{ legend }}</div>'
_DATA = "<p>{% if name %}<b>{{ name }}</b> {% endif %}{{ text }}</p>{{ chart }}"


def page(runs: Sequence[Run], *, now_s: float, over: Over = "step", refresh_s: float | None = None) -> str:
    """The whole HTML document. `refresh_s`: seconds after which a browser reloads the page."""
    title = " · ".join(run.name for run in runs)
    unit = unit_of(runs, over)
    loss = together(
        [_legend([run.name for run in runs] if len(runs) > 1 else []), wide_chart(runs, "loss", unit)]
    )
    sections = [
        _head(title, runs, now_s),
        _status(runs, now_s),
        _section("Loss", loss, _reading(runs)),
        *(_section(name, charts(runs, metrics, unit)) for name, metrics in groups(runs)),
        _section(
            "Where the time goes", _shares(runs), "Of the wall time of late. In grey: none of these parts."
        ),
        _section("Data", _data(runs)),
        _section("Samples", samples(runs), "Drawn with the averaged weights, oldest first."),
        _section("Events", events_table(runs)),
        _section("Config" if len(runs) == 1 else "Configs: what differs", configs(runs)),
    ]
    return document(title, CSS + STYLE, together(sections), refresh_s)


def _section(title: str, body: Html, lead: str = "") -> Html:
    """A section; nothing without a body."""
    return section(title, body, lead) if body else body


def _head(title: str, runs: Sequence[Run], now_s: float) -> Html:
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(now_s))
    run = runs[0] if len(runs) == 1 else None
    state = state_text(run, now_s).capitalize() if run else ""
    kind = STATE_KIND[run.state(now_s)] if run else ""
    return fill(_HEAD, title=title, run=run, kind=kind, state=state, num_runs=len(runs), when=when)


def _status(runs: Sequence[Run], now_s: float) -> Html:
    """One run: its facts side by side. Several runs: a table with a row for each."""
    if len(runs) == 1:
        return fill(_TILES, facts=facts(runs[0], now_s))
    known = [dict(facts(run, now_s)) for run in runs]
    rows = [
        (run.name, STATE_KIND[run.state(now_s)], state_text(run, now_s), found)
        for run, found in zip(runs, known, strict=True)
    ]
    names = list(dict.fromkeys(name for found in known for name in found))
    return fill(_STATUS, names=names, rows=rows, num_colours=NUM_COLOURS)


def _legend(names: Sequence[str]) -> Html:
    return fill(_LEGEND, names=names, num_colours=NUM_COLOURS) if names else together([])


def _reading(runs: Sequence[Run]) -> str:
    """How to read the curves, for the kinds of lines on the page."""
    parts = []
    if any(len(run.training.rows) > SMOOTH_FROM for run in runs):
        parts.append("Faint: each log interval; strong: the mean of its neighbourhood.")
    if len(runs) == 1 and runs[0].count(*TROUBLE, "resume"):
        parts.append("Dashed: a resume, an alarm, a roll-back or a step that was not taken.")
    return " ".join(parts)


def _shares(runs: Sequence[Run]) -> Html:
    bars = []
    for run in runs:
        if shares := run.shares():
            legend = _legend([f"{name} {share:.1%}" for name, share in shares.items()])
            bar = stacked_bar(list(shares.items()), f"time of {run.name}")
            bars.append(fill(_SHARES, name=run.name if len(runs) > 1 else "", bar=bar, legend=legend))
    return together(bars)


def _data(runs: Sequence[Run]) -> Html:
    """The data that were read, and the share of each set of a mixture."""
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
        if text or bars:
            chart = bar_chart(bars, "samples by set") if bars else ""
            parts.append(fill(_DATA, name=run.name if len(runs) > 1 else "", text=text, chart=chart))
    return together(parts)
