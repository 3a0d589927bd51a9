"""Reads a report's contents from a run folder. Every file is optional; the page says what is missing.

durations.json               [{"name", "seconds"}, ...] in the order the steps ran
notes.json                   ["sentence", ...]: which part is a stand-in for which, and other remarks
TRAINING/metrics.jsonl       one line a logged step, with "step", "loss" and other numbers
evaluation/NAME/scores.json  and per_item.jsonl beside it, written by evaluation.runner
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic cannot check typing's before Python 3.12

from base import files, limits
from base.config import UserError
from data.image_set import MANIFEST_NAME, ImageSet, Item
from evaluation.environment import machine, versions
from evaluation.runner import PER_ITEM_NAME, SCORES_NAME

METRICS_NAME = "metrics.jsonl"


class _Estimate(TypedDict):
    mean: float | None
    low: float | None
    high: float | None
    n: int
    note: NotRequired[str]


class _Scores(TypedDict):
    suite: str
    images: str
    manifest: NotRequired[str]
    scores: dict[str, _Estimate]
    groups: dict[str, dict[str, _Estimate]]
    n: int
    n_failed: int
    partial: bool
    seed: NotRequired[int]
    protocol: NotRequired[dict[str, Any]]
    fingerprints: NotRequired[dict[str, str]]
    versions: NotRequired[dict[str, str]]


class _Detail(TypedDict, total=False):
    seen: list[str] | dict[str, Any]
    background: str
    reasons: list[Any]
    failed: list[Any]
    answers: list[Any]


class _Line(TypedDict):
    key: str
    values: dict[str, bool | float | list[bool] | None]
    groups: list[str]
    detail: _Detail


class _Duration(TypedDict):
    name: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


# Strangers may have written these files: only what the types name is checked and used.
_SCORES, _LINES = TypeAdapter(_Scores), TypeAdapter(list[_Line])
_DURATIONS, _NOTES = TypeAdapter(list[_Duration]), TypeAdapter(list[str])


@dataclass(frozen=True)
class Training:
    """The logged numbers of one training."""

    name: str
    rows: tuple[Mapping[str, float | None], ...]  # in step order; each has "step"

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every step at which the metric was logged and finite."""
        pairs = [(row["step"], row.get(metric)) for row in self.rows]
        return [(step, value) for step, value in pairs if step is not None and value is not None]

    def seconds_at(self, step: int) -> float | None:
        """Seconds that the first `step` steps took; None: no line covers them.

        The seconds are the sum of `step_s`: data, forward, backward, optimizer and the waits between them. The start of
        a process, samples, checkpoints, exports and repeated steps do not count. A line's mean counts for all steps
        since the line before it, and inside that stretch the time grows evenly.
        """
        steps, seconds = [0.0], [0.0]
        for last, step_s in self.series("step_s"):
            seconds.append(seconds[-1] + (last - steps[-1]) * step_s)
            steps.append(last)
        return float(np.interp(step, steps, seconds)) if step <= steps[-1] else None

    def last(self) -> dict[str, float | None]:
        """Every logged number of the last row; {} without rows."""
        return dict(self.rows[-1]) if self.rows else {}


@dataclass(frozen=True)
class Evaluation:
    """One scored image set, with its images if they still exist."""

    name: str
    scores: Mapping[str, Any]  # scores.json
    per_item: Mapping[str, Mapping[str, Any]]  # key -> line of per_item.jsonl
    images: ImageSet | None  # None when the images are gone, or may not be shown
    hidden: str = ""  # where the images are that may not be shown

    def groups(self) -> dict[str, list[Item]]:
        """Scored items by their first group ("" without one), groups and items in manifest order."""
        grouped: dict[str, list[Item]] = {}
        for item in self.images.items if self.images else ():
            if item.key in self.per_item:
                name = next(iter(self.per_item[item.key]["groups"]), "")
                grouped.setdefault(name, []).append(item)
        return grouped


@dataclass(frozen=True)
class ReportInput:
    """Everything that a run, finished or not, has written so far."""

    durations: tuple[tuple[str, float], ...]  # step name, seconds
    notes: tuple[str, ...]
    trainings: tuple[Training, ...]  # in the order of `durations`, then by name
    evaluations: Mapping[str, Evaluation]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


def read_report_input(root: Path) -> ReportInput:
    """Reads the files that exist. Raises UserError: a malformed file."""
    durations = _read(root / "durations.json", _DURATIONS)
    order = {step["name"]: place for place, step in enumerate(durations)}
    trainings = [read_training(path.parent) for path in sorted(root.glob(f"*/{METRICS_NAME}"))]
    return ReportInput(
        durations=tuple((step["name"], float(step["seconds"])) for step in durations),
        notes=tuple(_read(root / "notes.json", _NOTES)),
        trainings=tuple(sorted(trainings, key=lambda t: (order.get(t.name, len(order)), t.name))),
        evaluations={
            path.parent.name: read_evaluation(path, [root])
            for path in sorted(root.glob(f"evaluation/*/{SCORES_NAME}"))
        },
        machine=machine(),
        versions=versions(),
    )


def read_training(run_dir: Path) -> Training:
    """The logged rows of a training; none if nothing was logged. Raises UserError: as `logged`."""
    return logged(run_dir.name, run_dir / METRICS_NAME)


def logged(name: str, path: Path) -> Training:
    """The lines of a log that have a step. A value that is no finite number becomes None, as a run writes it.

    Without the file there are no rows. Raises UserError: as read_lines.
    """
    rows = [{key: _number(value) for key, value in row.items()} for row in read_lines(path)]
    return Training(name, tuple(row for row in rows if row.get("step") is not None))


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer larger than any float
        return None


def read_evaluation(path: Path, named: Sequence[Path] = ()) -> Evaluation:
    """Reads scores.json and the files beside it, with pictures where `_may_show` says so.

    `named`: folders that a person named. Raises UserError: a file that is not what evaluation.runner
    writes.
    """
    scores = files.checked(_SCORES, files.read_json(path), path)
    lines = read_lines(path.with_name(PER_ITEM_NAME), "an evaluation")
    images_dir = path.parent / scores["images"]
    manifest = path.parent / scores["manifest"] if "manifest" in scores else images_dir / MANIFEST_NAME
    has_set = files.is_file(manifest)
    may_show = _may_show(images_dir, manifest, path.parent, named)
    return Evaluation(
        name=path.parent.name,
        scores=scores,
        per_item={line["key"]: line for line in files.checked(_LINES, lines, path.with_name(PER_ITEM_NAME))},
        images=ImageSet.open(images_dir, manifest) if has_set and may_show else None,
        hidden=os.path.normpath(images_dir) if has_set and not may_show else "",
    )


def _may_show(images: Path, manifest: Path, own: Path, named: Sequence[Path]) -> bool:
    """Whether a page may show these images: scores of a stranger may name any folder, and pages are sent to others.

    Images and manifest stand below the scores' `own` folder or below folders that the person named, or both are a set
    beside the own folder.
    """
    try:
        images, manifest, own = images.resolve(), manifest.resolve(), own.resolve()
        allowed = [own, *(folder.resolve() for folder in named)]
    except (OSError, ValueError, RuntimeError):  # a circle of links; a zero byte
        return False
    is_below = all(any(map(path.is_relative_to, allowed)) for path in (images, manifest))
    return is_below or (images.parent == own.parent and manifest == images / MANIFEST_NAME)


def _read(path: Path, kind: TypeAdapter[Any]) -> Any:
    return files.checked(kind, files.read_json(path), path) if path.is_file() else []


def read_lines(path: Path, writer: str = "a training") -> list[dict[str, Any]]:
    """Reads objects, one a line; [] without the file. The last line may be torn, as `writer` may still write it.

    Raises UserError naming the line: no JSON object, not UTF-8.
    """
    if not path.exists():
        return []
    *whole, last = limits.read_bytes(path, limits.DOCUMENT_BYTES).split(b"\n")
    rows = []
    for number, line in enumerate([*whole, last], start=1):
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            if number > len(whole):
                break
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{path}: is not what {writer} writes (line {number}: {reason})") from None
        if row:
            rows.append(row)
    return rows
