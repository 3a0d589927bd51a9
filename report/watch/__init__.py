"""Shows trainings from their run folders alone, while they run or later: in a terminal or as an HTML page."""

from report.watch.page import page
from report.watch.run import Run, read_run
from report.watch.terminal import screen

__all__ = ["Run", "page", "read_run", "screen"]
