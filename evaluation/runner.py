"""Image set + suite -> scores.json and per_item.jsonl: the contract of every evaluation.

per_item.jsonl has one line an item. scores.json has means and 95 % confidence intervals over all items and by
group, with everything needed to know what the numbers are. A score of a whole set (a distance between two sets
of images, a mean of group means) stands among the means: its value under "mean", "of": "set", an interval if it
has one and, if readers need it, a "note".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from base import files
from base.config import UserError
from base.team import ALONE, Team
from base.tf32 import exact_fp32
from data.image_set import ImageSet, Item
from evaluation.environment import versions
from evaluation.metrics.interval import Estimate, mean, rate

COMMAND = "evaluate"
SCORES_NAME = "scores.json"
PER_ITEM_NAME = "per_item.jsonl"


# One metric of one item: a number to average (nan: not defined here), or one or several trials of a rate.
Value = float | bool | tuple[bool, ...]


@dataclass(frozen=True)
class Measurement:
    """A suite's result for one item."""

    values: Mapping[str, Value]
    groups: tuple[str, ...] = ()  # groups the item counts in
    detail: Mapping[str, Any] = field(default_factory=dict)  # for readers of per_item.jsonl, JSON-able


@dataclass(frozen=True)
class SetScore:
    """A score of the whole set that single items do not have."""

    value: float  # nan: not defined
    n: int  # images it was computed from
    note: str = ""  # a caution for comparing it; "" for none
    low: float = math.nan  # 95 % confidence interval, nan where there is none
    high: float = math.nan

    @classmethod
    def of(cls, estimate: Estimate, note: str = "") -> SetScore:
        """The score and interval of a mean of means."""
        return cls(estimate.mean, estimate.n, note, estimate.low, estimate.high)


class Suite(Protocol):
    """What is measured on one kind of image set."""

    @property
    def name(self) -> str:
        """The suite's name in scores.json."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the images that every item must have."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The choices that define the numbers, as JSON values."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of the weights that judge the images."""

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """One measurement for each of `items`, in order."""


@runtime_checkable
class SetSuite(Protocol):
    """A suite that also scores the set as a whole."""

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> Mapping[str, SetScore]:
        """Scores of `items` together, under names that `measure` does not use."""


@runtime_checkable
class CollectingSuite(Protocol):
    """A suite with an expensive phase, whose results stay on disk; scoring then only reads them."""

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Computes what is missing of this rank's share. A killed run continues where it stopped."""


@exact_fp32()
def evaluate(
    suite: Suite,
    images_dir: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    allow_partial: bool = False,
    team: Team = ALONE,
    manifest: str | Path | None = None,
    follow_links: bool = False,
) -> dict[str, Any]:
    """Scores an image set; writes `output_dir`/per_item.jsonl, then scores.json, and returns scores.json's content.

    All of `team` share the expensive phase. Rank 0 alone scores; the other ranks return {}. fp32 is exact here: TF32
    would make a network's features, and so an FID, depend on the GPU.

    `seed`: the images' sampling seed, for the record. `manifest` replaces the folder's own; with
    `follow_links` its links may lead out of the folder. Raises UserError: `output_dir` holds scores of another origin;
    images are missing without `allow_partial`. With it they are counted in `n_failed` and the scores marked partial.
    """
    output_dir = Path(output_dir)
    images = ImageSet.open(images_dir, manifest, follow_links=follow_links)
    missing = images.missing(suite.roles)
    if missing and (not allow_partial or len(missing) == len(images.items)):
        raise UserError(
            f"{images_dir}: {len(missing)} of {len(images.items)} items lack an image (first: "
            f"'{missing[0].key}'); make them, or score the rest with allow_partial"
        )
    if team.rank == 0:
        check_scores(output_dir)
    lost = {item.key for item in missing}
    items = [item for item in images.items if item.key not in lost]
    if isinstance(suite, CollectingSuite):
        suite.collect(images, items, team.rank, team.world)
        team.barrier()
    if team.rank != 0:
        return {}
    measurements = suite.measure(images, items)
    assert len(measurements) == len(items)
    set_scores = suite.measure_set(images, items) if isinstance(suite, SetSuite) else {}
    lines = [
        {
            "key": item.key,
            "values": _finite(found.values),
            "groups": list(found.groups),
            "detail": dict(found.detail),
        }
        for item, found in zip(items, measurements, strict=True)
    ]
    files.claim(output_dir, COMMAND, (SCORES_NAME, PER_ITEM_NAME), _has_scores)
    files.write_text(output_dir / PER_ITEM_NAME, "".join(json.dumps(line) + "\n" for line in lines))
    means = estimates(measurements)
    assert not means.keys() & set_scores.keys(), "a metric is of items or of the set, not both"
    groups = sorted({group for found in measurements for group in found.groups})
    scores = {
        "suite": suite.name,
        "images": os.path.relpath(images_dir, output_dir),
        **({"manifest": os.path.relpath(manifest, output_dir)} if manifest is not None else {}),
        "n": len(items),
        "n_failed": len(missing),
        "partial": bool(missing),
        "scores": {**means, **{name: _set_entry(score) for name, score in set_scores.items()}},
        "groups": {
            group: estimates([found for found in measurements if group in found.groups]) for group in groups
        },
        "protocol": dict(suite.protocol),
        "fingerprints": dict(suite.fingerprints),
        "versions": versions(),
        "seed": seed,
    }
    files.write_json(output_dir / SCORES_NAME, scores)
    return scores


def check_scores(output_dir: Path) -> None:
    """Raises UserError: the folder holds a scores.json or per_item.jsonl of another origin. Writes nothing."""
    files.check_claim(output_dir, COMMAND, (SCORES_NAME, PER_ITEM_NAME), _has_scores)


def _has_scores(folder: Path) -> bool:
    """Whether an earlier version, which left no marker file, scored there."""
    try:
        return {"suite", "protocol", "scores"} <= set(files.read_json(folder / SCORES_NAME))
    except (OSError, ValueError, TypeError):
        return False


def estimates(measurements: Sequence[Measurement]) -> dict[str, dict[str, Any]]:
    """{metric: {"mean", "low", "high", "n"}} over items: rates for booleans, means for numbers.

    nan (not defined for an item) is left out of both sum and count; `n` of a rate counts trials.
    """
    names = dict.fromkeys(name for found in measurements for name in found.values)
    result = {}
    for name in names:
        trials: list[bool] = []
        numbers: list[float] = []
        for found in measurements:
            value = found.values.get(name, math.nan)
            if isinstance(value, tuple):
                trials += value
            elif isinstance(value, bool):
                trials.append(value)
            elif not math.isnan(value):
                numbers.append(value)
        assert not (trials and numbers), f"{name} is a rate or a mean, not both"
        result[name] = _finite(dataclasses.asdict(rate(trials) if trials else mean(numbers)))
    return result


def _set_entry(score: SetScore) -> dict[str, Any]:
    entry = {"mean": score.value, "low": score.low, "high": score.high, "n": score.n, "of": "set"}
    return _finite({**entry, "note": score.note} if score.note else entry)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None for nan, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
