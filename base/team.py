"""The processes that share a work: all ranks, or one process alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Team:
    """The processes that share an evaluation, or the making of an image set."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """Gathers one small value from each process, in the order of ranks, at all processes; a barrier."""


ALONE = Team()
