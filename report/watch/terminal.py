"""Draws a run in a terminal's characters: status, curves in braille dots, parts of the wall time, the last samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from base.config import UserError
from data.samples.images import read_rgb_file
from report.charts import Axis, short
from report.watch.curves import gentle
from report.watch.run import TROUBLE, Over, Run, Unit, unit_of
from report.watch.status import facts, state_text

LABEL_WIDTH = 8  # characters for the values left of a chart
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of a braille character, [x][y]
COLOURS = (36, 33, 35, 32, 31, 34)  # ANSI codes: one for each run
GREY, RED, BOLD = 90, 31, 1
SHARE_CHARACTERS = "█▓▒░▚▞▤▥"


Paint = Callable[[str, int], str]  # text, ANSI code -> text


def _coloured(text: str, code: int) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def _plain(text: str, _code: int) -> str:
    return text


def screen(
    runs: Sequence[Run],
    curves: Sequence[str],
    *,
    width: int,
    height: int,
    now_s: float,
    over: Over = "step",
    colours: bool = False,
    samples: bool = False,
) -> str:
    """The whole screen, in lines of at most `width` characters. `samples`: draws the last grid of the first run."""
    paint = _coloured if colours else _plain
    lines: list[str] = []
    for number, run in enumerate(runs):
        lines += _head(run, width, now_s, paint, COLOURS[number % len(COLOURS)])
    room = max(6, (height - len(lines) - 4 * len(runs)) // max(len(curves), 1) - 2)
    for curve in curves:
        lines += ["", *_chart(runs, curve, unit_of(runs, over), width, min(room, 20), paint)]
    for run in runs:
        if shares := run.shares():
            title = [paint(_fit(run.name, width), BOLD)] if len(runs) > 1 else []
            lines += ["", *title, _share_bar(shares, width), _fit(_share_legend(shares), width)]
    if samples and runs[0].grids:
        lines += ["", *picture(runs[0].grids[-1][1], width)]
    return "\n".join(lines) + "\n"


def _head(run: Run, width: int, now_s: float, paint: Paint, colour: int) -> list[str]:
    state = state_text(run, now_s)
    lines = [paint("● ", colour) + paint(_fit(f"{run.name}  {state}", width - 2), BOLD)]
    cells = [f"{name} {value}" for name, value in facts(run, now_s)]
    line = ""
    for cell in cells:
        if line and len(line) + len(cell) + 3 > width - 2:
            lines.append(f"  {line}")
            line = ""
        line = f"{line} · {cell}" if line else cell
    lines.append(f"  {_fit(line, width - 2)}")
    for event in [event for event in run.events if event.kind in (*TROUBLE, "stop")][-3:]:
        when = time.strftime("%d %b %H:%M", time.localtime(event.time_s))
        lines.append(paint(_fit(f"  {when}  {event.text}", width), RED))
    if run.grids:
        lines.append(paint(_printable(f"  samples {run.grids[-1][1]}"), GREY))  # whole, to be copied
    return lines


def _chart(runs: Sequence[Run], metric: str, unit: Unit, width: int, height: int, paint: Paint) -> list[str]:
    """One metric's chart: a title and `height` lines of dots."""
    series = [gentle(run.series(metric, unit)) for run in runs]
    shown = [points for points in series if points]
    if not shown:
        return [f"{metric}: not logged"]
    axis = Axis.of([value for points in shown for _, value in points])
    places = [x for points in shown for x, _ in points]
    first, last = min(places), max(places)
    columns = width - LABEL_WIDTH - 2
    cells = [[0] * columns for _ in range(height)]
    owners = [[0] * columns for _ in range(height)]

    def dot(points: Sequence[tuple[float, float]], place: int) -> tuple[int, int]:
        x, value = points[place]
        across = (x - first) / ((last - first) or 1.0) * (columns * 2 - 1)
        return round(across), round((1 - axis.place(value)) * (height * 4 - 1))

    for number, points in enumerate(series):
        for place in range(len(points)):
            (x0, y0), (x1, y1) = dot(points, max(place - 1, 0)), dot(points, place)
            length = max(abs(x1 - x0), abs(y1 - y0), 1)
            for part in range(length + 1):
                x, y = round(x0 + (x1 - x0) * part / length), round(y0 + (y1 - y0) * part / length)
                cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
                owners[y // 4][x // 2] = number
    labels = {round((1 - axis.place(tick)) * (height - 1)): label for tick, label in axis.ticks()}
    now = ", ".join(
        paint(short(points[-1][1]), COLOURS[number % len(COLOURS)])
        for number, points in enumerate(series)
        if points
    )
    lines = [f"{paint(metric, BOLD)} {now}"]
    for row in range(height):
        drawn = "".join(
            paint(chr(0x2800 + cell), COLOURS[owner % len(COLOURS)]) if cell else " "
            for cell, owner in zip(cells[row], owners[row], strict=True)
        )
        lines.append(paint(f"{labels.get(row, ''):>{LABEL_WIDTH}} ┤", GREY) + drawn)
    end = short(last)
    begin = f"{unit} {short(first)}"
    gap = max(columns - len(begin) - len(end), 1)
    lines.append(paint(f"{'':{LABEL_WIDTH + 2}}{begin}{'':{gap}}{end}", GREY))
    return lines


def _share_bar(shares: dict[str, float], width: int) -> str:
    """A bar of about one character for each per cent; time that no part claims is left empty."""
    room = width - 6
    bar = ""
    for share, character in zip(shares.values(), _share_characters(shares), strict=True):
        bar += character * round(share * room)
    return f"time ▕{bar[:room]:{room}}"[:width]


def _share_legend(shares: dict[str, float]) -> str:
    characters = _share_characters(shares)
    return "     " + "  ".join(
        f"{character} {name} {share:.0%}"
        for character, (name, share) in zip(characters, shares.items(), strict=True)
    )


def _share_characters(shares: dict[str, float]) -> list[str]:
    return [SHARE_CHARACTERS[min(number, len(SHARE_CHARACTERS) - 1)] for number in range(len(shares))]


def picture(path: Path, width: int) -> list[str]:
    """An image in half blocks of 24-bit colour, at most `width` characters wide; a character shows two pixels."""
    try:
        image = read_rgb_file(path)
    except UserError:  # the file is half copied
        return [_printable(f"{path}: cannot be read")]
    columns = min(width, image.width)
    rows = math.ceil(image.height * columns / image.width / 2) * 2
    pixels = np.asarray(image.resize((columns, rows), Image.Resampling.BOX)).tolist()
    lines = []
    for top in range(0, rows, 2):
        pairs = zip(pixels[top], pixels[top + 1], strict=True)
        line = "".join(
            f"\x1b[38;2;{';'.join(map(str, upper))};48;2;{';'.join(map(str, lower))}m▀"
            for upper, lower in pairs
        )
        lines.append(line + "\x1b[0m")
    return lines


def _fit(text: str, width: int) -> str:
    """At most `width` characters, without control characters that could steer the terminal."""
    text = _printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)
