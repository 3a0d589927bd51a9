"""Shows curves and samples of trainings, in the terminal or as HTML: launch/watch.py RUN [RUN ...] [--html FILE]"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from base import files, terminal
from base.config import UserError
from launch.runs import entry

if TYPE_CHECKING:
    from report.watch import Run

CLOSED = ("finished", "stopped")


def main() -> None:
    """Redraws until every run has ended or Ctrl-C. Only reads the run folders."""
    arguments = _parser().parse_args()
    entry.use_torch()
    from report.watch import read_run

    try:
        while True:
            runs = [
                read_run(path, name)
                for path, name in zip(arguments.runs, _names(arguments.runs), strict=True)
            ]
            _show(runs, arguments)
            is_over = all(run.state(time.time()) in CLOSED for run in runs)
            if arguments.once or is_over or (arguments.html and arguments.every is None):
                return
            time.sleep(arguments.every or 5.0)
    except KeyboardInterrupt:
        return


def _show(runs: list[Run], arguments: argparse.Namespace) -> None:
    from report.watch import page, screen

    if arguments.html:
        refresh_s = None if arguments.once else arguments.every
        files.write_page(
            arguments.html, page(runs, now_s=time.time(), over=arguments.over, refresh_s=refresh_s)
        )
        terminal.say(arguments.html)
        return
    is_terminal = sys.stdout.isatty()
    size = shutil.get_terminal_size((100, 40))
    text = screen(
        runs,
        arguments.curves.split(","),
        width=size.columns,
        height=size.lines,
        now_s=time.time(),
        over=arguments.over,
        colours=is_terminal,
        samples=arguments.samples,
    )
    if is_terminal and not arguments.once:
        terminal.clear()
    terminal.show(text)


def _names(paths: list[Path]) -> list[str]:
    """Each folder's name, with enough of its parents to be unique."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UserError("the same run is given twice; name each once")
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run_dir of a training; several are compared"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page instead; with --every, again and again")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="between two looks (default 5)")
    parser.add_argument("--once", action="store_true", help="look once")
    parser.add_argument(
        "--curves", default="loss", help="metrics to draw in the terminal (default loss), by commas"
    )
    parser.add_argument("--over", choices=("step", "time"), default="step", help="what runs along the curves")
    parser.add_argument("--samples", action="store_true", help="draw the last sample grid in the terminal")
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
