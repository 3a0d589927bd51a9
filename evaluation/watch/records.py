"""What a run left besides numbers: sample grids, events, its config."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from data.images import read_rgb_file
from engine.config import UserError
from evaluation.report.charts import NUM_COLOURS
from evaluation.report.gallery import inlined
from evaluation.watch.run import TROUBLE, Run

MAX_GRIDS = 9  # of a run; the first, the last, and some between
GRID_CELL_PX = 360
GRID_PX = 2 * GRID_CELL_PX
MAX_EVENTS = 60  # of a run; checkpoints give way first


def table(head: str, rows: Sequence[str], kind: str = "") -> str:
    """A table of <th> and <tr>."""
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def key(number: int) -> str:
    """The little square in the colour of run `number`."""
    return f'<i class="key k{number % NUM_COLOURS}"></i>'


def samples(runs: Sequence[Run]) -> str:
    """Some grids of each run."""
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
            except UserError:  # half copied
                shown = '<span class="absent">cannot be read</span>'
            figures.append(f'<figure class="grid">{shown}<figcaption>step {step:,}</figcaption></figure>')
        if figures:
            title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
            cell = f"--cell: {GRID_CELL_PX}px"
            strips.append(f'{title}<div class="grid-cards" style="{cell}">{"".join(figures)}</div>')
    return "".join(strips)


def events_table(runs: Sequence[Run]) -> str:
    """What happened, oldest first; "" where nothing is known."""
    rows, left_out = [], 0
    for number, run in enumerate(runs):
        events = list(run.events)
        if len(events) > MAX_EVENTS:  # the newest; of checkpoints only the last
            newest = run.last("checkpoint")
            events = [event for event in events if event.kind != "checkpoint" or event is newest][
                -MAX_EVENTS:
            ]
        left_out += len(run.events) - len(events)
        for event in events:
            kind = "bad" if event.kind in (*TROUBLE, "stop") else "good" if event.kind == "finish" else "soft"
            when = time.strftime("%d %b %H:%M:%S", time.localtime(event.time_s))
            name = f"<td>{key(number)}{escape(run.name)}</td>" if len(runs) > 1 else ""
            rows.append(
                (event.time_s, f'<tr>{name}<td class="soft">{when}</td><td class="number">{event.step:,}</td>'
                f'<td class="badge {kind}">{escape(event.kind.replace("_", "-"))}</td>'
                f'<td class="text">{escape(event.text)}</td></tr>')
            )  # fmt: skip
    if not rows:
        return ""
    run_head = "<th>run</th>" if len(runs) > 1 else ""
    head = f'{run_head}<th>time</th><th class="number">step</th><th>what</th><th></th>'
    more = f'<p class="soft">{left_out} older ones are in events.jsonl.</p>' if left_out else ""
    return f'<div class="scroll">{table(head, [row for _, row in sorted(rows)])}</div>{more}'


def configs(runs: Sequence[Run]) -> str:
    """Of one run all settings; of several those that differ, and the others to unfold."""
    settings = [dict(_flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for known in settings for name in known))
    if not names:
        return ""
    differing = [name for name in names if len({known.get(name, "–") for known in settings}) > 1]
    equal = [name for name in names if name not in differing]
    heads = "".join(f"<th>{key(number)}{escape(run.name)}</th>" for number, run in enumerate(runs))
    rows = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="config">{escape(known.get(name, "–"))}</td>' for known in settings)
        + "</tr>"
        for name in differing
    ]
    differences = f'<div class="scroll">{table(f"<th></th>{heads}", rows)}</div>' if rows else ""
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(settings[0][name])}</dd>" for name in equal)
    if len(runs) == 1:
        return f"<details open><summary>{len(equal)} settings</summary><dl>{listed}</dl></details>"
    return (
        f"{differences}<details><summary>{len(equal)} settings are equal</summary><dl>{listed}</dl></details>"
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`section.key` and value as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
