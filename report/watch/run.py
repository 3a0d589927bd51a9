"""Reads a run folder: logged numbers, events, samples, config. Numbers or events suffice; the rest is optional."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base import files
from base.config import UserError
from report.run_contents import METRICS_NAME, Training, logged, read_lines

METRICS, SCORES, EVENTS, CONFIG = METRICS_NAME, "scores.jsonl", "events.jsonl", "config.json"
RECENT_LINES = 20
"""Log lines from which pace and rates are computed."""
MIN_SILENCE_S = 60.0
SILENT_LINES = 6
"""A run is taken for dead after this many usual log intervals (and MIN_SILENCE_S) without a line."""
MAX_TIME_S = 2.0**36  # the year 4147
TROUBLE = ("warning", "alarm", "nonfinite", "spike", "roll_back", "error")

Over = Literal["step", "time"]
Unit = Literal["step", "minutes", "hours"]
SECONDS: dict[Unit, float] = {"minutes": 60.0, "hours": 3600.0}
State = Literal["waiting", "running", "silent", "stopped", "finished"]


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    time_s: float  # Unix time
    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """A training as its run folder shows it."""

    path: Path
    name: str
    training: Training
    scores: Training  # evaluations during the training
    config: Mapping[str, Any]
    events: tuple[Event, ...]
    grids: tuple[tuple[int, Path], ...]  # step, image; ascending
    changed_s: float  # modification time of its newest file, Unix

    @property
    def step(self) -> int:
        """Number of finished steps, as last logged."""
        return int(self.training.last().get("step") or 0)

    @property
    def num_steps(self) -> int | None:
        """Number of steps of the whole run; None: the folder does not say."""
        engine = self.config.get("engine")
        planned = engine.get("steps") if isinstance(engine, Mapping) else None
        steps = self.training.last().get("num_steps") or planned
        return int(steps) if isinstance(steps, int | float) and math.isfinite(steps) and steps > 0 else None

    @property
    def last_line_s(self) -> float:
        """Unix time of the last line written."""
        logged = self.training.last().get("time_s")
        times = [event.time_s for event in self.events[-1:]] + ([logged] if logged else [])
        return max(times, default=self.changed_s)

    def state(self, now_s: float) -> State:
        """The state that the run seems to be in."""
        kind = self.events[-1].kind if self.events else ""
        if kind == "finish" or (not self.events and (self.path / "export").is_dir()):
            return "finished"
        if kind in ("stop", "error"):
            return "stopped"
        usual_s = self._interval_s() * SILENT_LINES
        if now_s - self.last_line_s > max(MIN_SILENCE_S, usual_s):
            return "silent"
        return "running" if self.training.rows else "waiting"

    def step_s(self) -> float | None:
        """Recent wall time of a step in seconds, everything included; None before two lines."""
        paces = self._paces()
        if paces:
            return statistics.median(paces)
        return self.training.last().get("step_s")

    def eta_s(self) -> float | None:
        """Seconds until the last step, at the recent pace."""
        pace, total = self.step_s(), self.num_steps
        return None if pace is None or total is None else max(total - self.step, 0) * pace

    @property
    def begin_s(self) -> float | None:
        """Unix time of the first logged line; None: no line has a time."""
        return next((row["time_s"] for row in self.training.rows if row.get("time_s")), None)

    def series(self, metric: str, unit: Unit) -> list[tuple[float, float]]:
        """(x, value) of every finite logged value; x: the step, or the time since the first line."""
        begin_s = self.begin_s
        source = self.scores if metric in self.score_names else self.training
        if unit == "step":
            return source.series(metric)
        rows = [(row.get("time_s"), row.get(metric)) for row in source.rows]
        return [
            ((time_s - begin_s) / SECONDS[unit], value)
            for time_s, value in rows
            if time_s is not None and begin_s is not None and value is not None
        ]

    @property
    def score_names(self) -> list[str]:
        """`SUITE/METRIC` of every evaluation, in order of appearance."""
        names = dict.fromkeys(name for row in self.scores.rows for name in row)
        return [name for name in names if name not in ("step", "time_s")]

    def recent(self, metric: str) -> float | None:
        """Mean over the last lines that have the metric."""
        values = [value for _, value in self.training.series(metric)[-RECENT_LINES:]]
        return statistics.fmean(values) if values else None

    def shares(self) -> dict[str, float]:
        """Parts of the wall time by name, over the last lines; a part that a line does not name took no time there."""
        rows = self.training.rows[-RECENT_LINES:]
        names = {name for row in rows for name in row if name.endswith("_share")}
        means = {
            name: sum(min(max(row.get(name) or 0.0, 0.0), 1.0) for row in rows) / len(rows) for name in names
        }
        order = sorted(means, key=lambda name: -means[name])
        return {name.removesuffix("_share"): means[name] for name in order if means[name] >= 0.0005}

    def count(self, *kinds: str) -> int:
        """Number of events of these kinds."""
        return sum(event.kind in kinds for event in self.events)

    def last(self, kind: str) -> Event | None:
        """The newest event of a kind."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)

    def _paces(self) -> list[float]:
        rows = [row for row in self.training.rows[-RECENT_LINES - 1 :] if row.get("time_s") and row["step"]]
        pairs = itertools.pairwise(rows)
        gaps = [(b["time_s"] - a["time_s"], b["step"] - a["step"]) for a, b in pairs]  # type: ignore[operator]
        return [seconds / steps for seconds, steps in gaps if steps > 0 and seconds > 0]

    def _interval_s(self) -> float:
        rows = self.training.rows
        if len(rows) < 2 or not (pace := self.step_s()):
            return 0.0
        return pace * ((rows[-1]["step"] or 0) - (rows[-2]["step"] or 0))


def unit_of(runs: Sequence[Run], over: Over) -> Unit:
    """The unit of the curves' x: minutes if no run has taken two hours."""
    if over == "step":
        return "step"
    longest_s = max((run.last_line_s - (run.begin_s or run.last_line_s) for run in runs), default=0.0)
    return "minutes" if longest_s < 2 * SECONDS["hours"] else "hours"


def read_run(path: Path, name: str = "") -> Run:
    """Reads the files that exist. Raises UserError: no run folder, or a file that no run wrote."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the run_dir of a training")
    if not (path / METRICS).is_file() and not (path / EVENTS).is_file():
        inside = sorted(found.parent.name for found in path.glob(f"*/{METRICS}"))
        hint = f"runs inside it: {', '.join(inside)}" if inside else "give the run_dir of a training"
        raise UserError(f"{path}: no run has logged anything here yet; {hint}")
    name = name or path.resolve().name
    grids = [
        (int(grid.stem[5:]), grid)
        for grid in (path / "samples").glob("step_*.png")
        if grid.stem[5:].isdecimal()
    ]
    times = [found.stat().st_mtime for found in (path / METRICS, path / EVENTS) if found.is_file()]
    return Run(
        path=path,
        name=name,
        training=logged(name, path / METRICS),
        scores=logged(name, path / SCORES),
        config=_config(path / CONFIG),
        events=tuple(_event(row, path / EVENTS) for row in read_lines(path / EVENTS)),
        grids=tuple(sorted(grids)),
        changed_s=max(times),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        return files.read_object(path) if path.is_file() else {}
    except UserError as error:
        raise UserError(f"{path}: is not what a training writes; is this a run folder? ({error})") from None


def _event(row: Mapping[str, Any], path: Path) -> Event:
    try:
        event = Event(float(row["time_s"]), int(row["step"]), str(row["kind"]), str(row["text"]))
        if not 0 <= event.time_s < MAX_TIME_S:
            raise ValueError("time_s")
        return event
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(
            f"{path}: is not what a training writes ({str(row)[:100]}); is this a run folder?"
        ) from None
