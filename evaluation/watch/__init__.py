"""A look at trainings from their run folders alone, while they run or later: in a terminal or as an HTML page."""

from evaluation.watch.page import page
from evaluation.watch.run import Run, read_run
from evaluation.watch.terminal import screen

__all__ = ["Run", "page", "read_run", "screen"]
