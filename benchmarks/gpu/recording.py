"""Runs measurements one after another. One may fail, or be left out for lack of time, and the rest goes on."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Values = dict[str, Any]
MAX_REASON = 300


class Recorder:
    """Appends a JSON line for each measurement: {group, name, and values, or error, or skipped}."""

    def __init__(self, path: Path, group: str, budget_s: float) -> None:
        self._path, self._group = path, group
        self._end_s = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        """Seconds left of the group's time."""
        return self._end_s - time.monotonic()

    def run(self, name: str, measure: Callable[[], Values], *, needs_s: float) -> Values | None:
        """The result of `measure`, or None. The measurement is left out if less than `needs_s` seconds are left."""
        if self.left_s < needs_s:
            self.write(name, skipped=f"{self.left_s:.0f} s are left, it needs about {needs_s:.0f}")
            return None
        begin_s = time.monotonic()
        try:
            values = measure()
        except Exception as error:  # an accelerator fails in many ways; each is a line of the page
            self.write(name, error=in_one_line(error))
            return None
        finally:
            free()
        self.write(name, values={**values, "took_s": time.monotonic() - begin_s})
        return values

    def write(self, name: str, **entry: Any) -> None:
        """Writes one line at once, as the process may die before the next."""
        with self._path.open("a") as file:
            file.write(json.dumps({"group": self._group, "name": name, **entry}) + "\n")


def in_one_line(error: BaseException) -> str:
    """Kind and message of the error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON]


def free() -> None:
    """Frees memory that nothing holds; models and their engines hold each other in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Waits for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(call: Callable[[], object], device: torch.device, *, at_least_s: float) -> float:
    """Mean seconds over the calls that take `at_least_s` together, at least two. The caller has warmed up."""
    synchronise(device)
    begin_s, num_calls = time.perf_counter(), 0
    while num_calls < 2 or time.perf_counter() - begin_s < at_least_s:
        call()
        synchronise(device)
        num_calls += 1
    return (time.perf_counter() - begin_s) / num_calls


def peak_gib(device: torch.device) -> float | None:
    """Peak allocated memory since the last reset, GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
