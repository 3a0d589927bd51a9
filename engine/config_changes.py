"""Compares a resumed run's config with that of its last start: each changed key is reported, or refused.

The batch source compares the data's settings (set, seed, streams, budget); the checkpoint compares shapes and
fingerprints. docs/reliability.md has the table of what may change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from base.config import UserError, flatten

NOT_SET = "not set"
REFUSED = {
    f"engine.{name}.name": "the states of Muon and AdamW do not turn into each other"
    for name in ("optimizer", "adversary_optimizer")
}
"""Keys that a run with a checkpoint cannot change, and why."""
NUM_NAMED = 3


@dataclass(frozen=True)
class Change:
    """One changed key of a config, as people type it, with its value at the last start and its present value."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.now}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every key whose value differs between two resolved configs, in the order of `now`; removed keys come last."""
    old, new = flatten(before), flatten(now)
    pairs = [(key, old.get(key, NOT_SET), new.get(key, NOT_SET)) for key in {**new, **old}]
    return [Change(key, was, value) for key, was, value in pairs if was != value]


def refuse(found: Sequence[Change], where: str) -> None:
    """Raises UserError for the first change that a run with a checkpoint cannot take."""
    for change in found:
        if change.key in REFUSED:
            raise UserError(
                f"{where}: {change}: {REFUSED[change.key]}; set {change.key}={change.before}, or use a new run_dir"
            )


def named(found: Sequence[Change]) -> str:
    """Names the first changes, for the end of a refusal; if there are none, says what else may have changed."""
    if not found:
        return "no key of the config changed, so a file that it names did"
    more = f" and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
    return "changed since the last start: " + ", ".join(map(str, found[:NUM_NAMED])) + more
