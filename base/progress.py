"""Progress of long work on stderr: how much is done, how fast, time left."""

from __future__ import annotations

import sys
import time

from base.terminal import say

REPORT_EVERY_S = 1.0


class ProgressLine:
    """Prints at most one line a second, and a last line at the end."""

    def __init__(self, what: str, unit: str) -> None:
        self._what = what
        self._unit = unit
        self._start_s = self._shown_s = time.monotonic()
        self._is_over = False

    def show(self, count: int, share: float) -> None:
        """Reports that `count` units are done, which is `share` (0 to 1) of the work."""
        now_s = time.monotonic()
        if self._is_over or (now_s - self._shown_s < REPORT_EVERY_S and share < 1):
            return
        self._is_over = share >= 1
        self._shown_s = now_s
        spent_s = max(now_s - self._start_s, 1e-3)
        left = f"{spent_s * (1 - share) / share:.0f} s" if share > 0 else "unknown"
        say(
            f"{self._what}: {count} {self._unit}, {count / spent_s:.0f}/s, {share:.0%}, ETA {left}",
            sys.stderr,
        )
