"""The records of a run besides numbers: sample grids, events, config."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from base.config import UserError
from data.samples.images import read_rgb_file
from report.charts import NUM_COLOURS
from report.gallery import grid, inlined
from report.markup import Html, facts, fill, together
from report.watch.run import TROUBLE, Run

MAX_GRIDS = 9  # shown of a run: the first, the last, and some between
GRID_CELL_PX = 360
GRID_PX = 2 * GRID_CELL_PX
MAX_EVENTS = 60  # shown of a run; checkpoints are left out first


_GRID = '<figure class="grid">{{ shown }}<figcaption>step {{ step }}</figcaption></figure>'
_EVENTS = """\
<div class="scroll"><table class=""><thead><tr>{% if has_names %}<th>run</th>{% endif %}<th>time</th>\
<th class="number">step</th><th>what</th><th></th></tr></thead><tbody>
{% for number, name, kind, when, step, what, text in rows %}
<tr>{% if has_names %}<td><i class="key k{{ number }}"></i>{{ name }}</td>{% endif %}<td class="soft">{{ when }}</td>\
<td class="number">{{ step }}</td><td class="badge {{ kind }}">{{ what }}</td><td class="text">{{ text }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if left_out %}<p class="soft">{{ left_out }} older ones are in events.jsonl.</p>{% endif %}"""
_DIFFERING = """\
<div class="scroll"><table class=""><thead><tr><th></th>
{% for name in names %}<th><i class="key k{{ loop.index0 % num_colours }}"></i>{{ name }}</th>{% endfor %}
</tr></thead><tbody>
{% for name, values in rows %}
<tr><td>{{ name }}</td>{% for value in values %}<td class="config">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""
_EQUAL = """\
<details{{ " open" if is_open }}><summary>{{ title }}</summary>{{ settings }}</details>"""


def samples(runs: Sequence[Run]) -> Html:
    """Some sample grids of each run."""
    strips = []
    for run in runs:
        grids = run.grids
        if len(grids) > MAX_GRIDS:
            places = [round(k * (len(grids) - 1) / (MAX_GRIDS - 1)) for k in range(MAX_GRIDS)]
            grids = tuple(grids[place] for place in places)
        figures = []
        for step, path in grids:
            try:
                shown = inlined(read_rgb_file(path), f"samples of {run.name} at step {step}", 1, GRID_PX)
            except UserError:  # the file is half copied
                shown = fill('<span class="absent">cannot be read</span>')
            figures.append(fill(_GRID, shown=shown, step=f"{step:,}"))
        if figures and len(runs) > 1:
            strips.append(fill("<h3>{{ name }}</h3>", name=run.name))
        if figures:
            strips.append(grid(figures, GRID_CELL_PX))
    return together(strips)


def events_table(runs: Sequence[Run]) -> Html:
    """The events, oldest first; "" without any."""
    rows, left_out = [], 0
    for number, run in enumerate(runs):
        events = list(run.events)
        if len(events) > MAX_EVENTS:  # the newest, with only the last checkpoint
            newest = run.last("checkpoint")
            events = [event for event in events if event.kind != "checkpoint" or event is newest][
                -MAX_EVENTS:
            ]
        left_out += len(run.events) - len(events)
        for event in events:
            kind = "bad" if event.kind in (*TROUBLE, "stop") else "good" if event.kind == "finish" else "soft"
            when = time.strftime("%d %b %H:%M:%S", time.localtime(event.time_s))
            what = event.kind.replace("_", "-")
            row = (number % NUM_COLOURS, run.name, kind, when, f"{event.step:,}", what, event.text)
            rows.append((event.time_s, row))
    if not rows:
        return together([])
    ordered = [row for _, row in sorted(rows, key=lambda timed: timed[0])]
    return fill(_EVENTS, rows=ordered, has_names=len(runs) > 1, left_out=left_out)


def configs(runs: Sequence[Run]) -> Html:
    """All settings of a single run; of several runs the settings that differ, and the others folded."""
    settings = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for known in settings for name in known))
    if not names:
        return together([])
    differing = [name for name in names if len({known.get(name, "–") for known in settings}) > 1]
    rows = [(name, [known.get(name, "–") for known in settings]) for name in differing]
    equal = [(name, settings[0][name]) for name in names if name not in differing]
    is_one = len(runs) == 1
    title = f"{len(equal)} settings" if is_one else f"{len(equal)} settings are equal"
    listed = fill(_EQUAL, title=title, settings=facts(equal), is_open=is_one)
    if not rows:
        return listed
    heads = {"names": [run.name for run in runs], "num_colours": NUM_COLOURS}
    return together([fill(_DIFFERING, **heads, rows=rows), listed])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields `section.key` and the value as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
