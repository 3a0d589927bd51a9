"""What a report shows, read from a run folder. Everything is optional: what is absent is said on the page.

durations.json               [{"name", "seconds"}, ...] in the order the steps ran
notes.json                   ["sentence", ...]: what stands in for what, and other plain words
TRAINING/metrics.jsonl       one line a logged step, with "step", "loss" and other numbers
evaluation/NAME/scores.json  and per_item.jsonl beside it, written by evaluation.runner
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import files, limits
from evaluation.environment import machine, versions
from evaluation.manifest import MANIFEST_NAME, ImageSet, Item
from evaluation.runner import PER_ITEM_NAME, SCORES_NAME

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Training:
    """The logged numbers of one training."""

    name: str
    rows: tuple[Mapping[str, float | None], ...]  # in step order; each has "step"

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged and finite."""
        pairs = [(row["step"], row.get(metric)) for row in self.rows]
        return [(step, value) for step, value in pairs if step is not None and value is not None]

    def seconds_at(self, step: int) -> float | None:
        """Seconds that the first `step` steps took; None: not logged so far.

        They are the sum of `step_s`: data, forward, backward, optimizer and what they wait for. The start of a process,
        samples, checkpoints, exports and steps that were done again later do not count. A line's mean counts for all
        steps since the line before it, and inside that stretch the time grows evenly.
        """
        steps, seconds = [0.0], [0.0]
        for last, step_s in self.series("step_s"):
            seconds.append(seconds[-1] + (last - steps[-1]) * step_s)
            steps.append(last)
        return float(np.interp(step, steps, seconds)) if step <= steps[-1] else None

    def last(self) -> dict[str, float | None]:
        """Every logged number of the last row; {} before the first."""
        return dict(self.rows[-1]) if self.rows else {}


@dataclass(frozen=True)
class Evaluation:
    """One scored image set."""

    name: str
    scores: Mapping[str, Any]  # scores.json
    per_item: Mapping[str, Mapping[str, Any]]  # key -> line of per_item.jsonl
    images: ImageSet | None  # None when the images are gone

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
    """A run as far as it got."""

    durations: tuple[tuple[str, float], ...]  # step name, seconds
    notes: tuple[str, ...]
    trainings: tuple[Training, ...]  # in the order of `durations`, then by name
    evaluations: Mapping[str, Evaluation]
    machine: Mapping[str, str]
    versions: Mapping[str, str]


def read_report_input(root: Path) -> ReportInput:
    """Reads what is there."""
    durations = _read_json(root / "durations.json", [])
    order = {step["name"]: place for place, step in enumerate(durations)}
    trainings = [read_training(path.parent) for path in sorted(root.glob(f"*/{METRICS_NAME}"))]
    return ReportInput(
        durations=tuple((str(step["name"]), float(step["seconds"])) for step in durations),
        notes=tuple(_read_json(root / "notes.json", [])),
        trainings=tuple(sorted(trainings, key=lambda t: (order.get(t.name, len(order)), t.name))),
        evaluations={
            path.parent.name: read_evaluation(path)
            for path in sorted(root.glob(f"evaluation/*/{SCORES_NAME}"))
        },
        machine=machine(),
        versions=versions(),
    )


def read_training(run_dir: Path) -> Training:
    """What a training logged; no rows where it logged nothing."""
    path = run_dir / METRICS_NAME
    return Training(run_dir.name, read_lines(path) if path.is_file() else ())


def read_evaluation(path: Path) -> Evaluation:
    """What stands beside a scores.json."""
    scores = files.read_json(path)
    images_dir = path.parent / scores["images"]
    manifest = path.parent / scores["manifest"] if "manifest" in scores else images_dir / MANIFEST_NAME
    return Evaluation(
        name=path.parent.name,
        scores=scores,
        per_item={line["key"]: line for line in read_lines(path.with_name(PER_ITEM_NAME))},
        images=ImageSet.open(images_dir, manifest) if manifest.is_file() else None,
    )


def _read_json(path: Path, default: Any) -> Any:
    return files.read_json(path) if path.is_file() else default


def read_lines(path: Path) -> tuple[Any, ...]:
    """JSON lines; the last one may be torn while a training is still writing it. Raises JSONDecodeError."""
    *whole, last = limits.read_text(path, limits.DOCUMENT_BYTES).split("\n")
    rows = [json.loads(line) for line in whole if line]
    try:
        return (*rows, json.loads(last)) if last else tuple(rows)
    except json.JSONDecodeError:
        return tuple(rows)
