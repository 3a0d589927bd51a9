"""Translates their parameter names into ours by a table of rules, and reports tensors left over on either side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """Names that match `theirs` as a whole become `ours`; the first matching rule applies."""

    theirs: str
    """A regular expression over their names."""
    ours: str | None
    """The replacement (re.sub); None: no model here needs the tensor, and it is left out."""
    part: int = 0
    """Index of the tensor among those stacked into ours along the first axis: query, key, value."""


def modules(theirs: str, ours: str, names: Mapping[str, str]) -> list[Rule]:
    """Rules for weight and bias of each module in `names`; `theirs` (a regular expression) and `ours` are prefixes."""
    return [
        Rule(rf"{theirs}{re.escape(old)}\.(?P<kind>weight|bias)", rf"{ours}{new}.\g<kind>")
        for old, new in names.items()
    ]


@dataclass(frozen=True)
class Translation:
    """Where each of our tensors comes from."""

    sources: Mapping[str, tuple[str, ...]]
    """Our name -> their names, in the order they are stacked."""
    left_out: tuple[str, ...]
    """Their names that a rule leaves out."""
    unknown: tuple[str, ...]
    """Their names that no rule matches."""

    def assemble(self, tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Stacks and reshapes their tensors into ours."""
        stacked = {
            ours: torch.cat([tensors[name] for name in theirs]) if len(theirs) > 1 else tensors[theirs[0]]
            for ours, theirs in self.sources.items()
        }
        return {ours: tensor.reshape(shapes[ours]) for ours, tensor in stacked.items()}


def translate(names: Iterable[str], rules: Sequence[Rule]) -> Translation:
    """Applies the rules to every one of their names."""
    parts: dict[str, dict[int, str]] = {}
    left_out, unknown = [], []
    for name in names:
        for rule in rules:
            match = re.fullmatch(rule.theirs, name)
            if match is None:
                continue
            if rule.ours is None:
                left_out.append(name)
            else:
                place = parts.setdefault(match.expand(rule.ours), {})
                assert rule.part not in place, f"two rules fill the same place: {name}, {place[rule.part]}"
                place[rule.part] = name
            break
        else:
            unknown.append(name)
    sources = {ours: tuple(place[part] for part in sorted(place)) for ours, place in parts.items()}
    return Translation(sources, tuple(left_out), tuple(unknown))


@dataclass(frozen=True)
class Row:
    """One module's line in the report."""

    module: str
    num_theirs: int
    """Number of their tensors used."""
    num_ours: int
    """Number of our tensors filled."""
    num_values: int
    """Number of values in our tensors."""


@dataclass(frozen=True)
class Report:
    """The account of every tensor on both sides."""

    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]
    """One line for each tensor that is unknown, missing or of another shape."""
    notes: tuple[str, ...] = ()
    """What else a person should know, one line each."""

    def lines(self) -> list[str]:
        """A table by module, what was left out, and the verdict."""
        total = Row("all", *(sum(getattr(row, key) for row in self.rows) for key in _COUNTS))
        lines = [f"{'module':24s} {'their tensors':>13s} {'our tensors':>12s} {'parameters':>13s}"]
        lines += [
            f"{row.module:24s} {row.num_theirs:13,d} {row.num_ours:12,d} {row.num_values:13,d}"
            for row in (*self.rows, total)
        ]
        if self.left_out:
            modules = sorted({name.partition(".")[0] for name in self.left_out})
            lines.append(f"left out, no part of this model: {len(self.left_out)} of {', '.join(modules)}")
        lines += self.notes
        if self.problems:
            return [*lines, *self.problems, f"not imported: {len(self.problems)} tensors do not fit"]
        return [*lines, "every parameter is mapped; none is left over, neither theirs nor ours"]


_COUNTS = ("num_theirs", "num_ours", "num_values")


def check(translation: Translation, theirs: Shapes, ours: Shapes) -> Report:
    """Compares names and shapes; reads no values."""
    problems = [f"theirs, unknown: {name} {list(theirs[name])}" for name in translation.unknown]
    rows: dict[str, Row] = {}
    for name, sources in translation.sources.items():
        found = _stacked([theirs[source] for source in sources])
        if name not in ours:
            problems.append(f"theirs, without a place in ours: {', '.join(sources)} -> {name} {list(found)}")
        elif not _fits(found, ours[name]):
            problems.append(f"another shape: {', '.join(sources)} {list(found)} -> {name} {list(ours[name])}")
        else:
            module = _module(name)
            row = rows.get(module, Row(module, 0, 0, 0))
            values = math.prod(found)
            rows[module] = Row(
                module, row.num_theirs + len(sources), row.num_ours + 1, row.num_values + values
            )
    missing = [name for name in ours if name not in translation.sources]
    problems += [f"ours, not in the file: {name} {list(ours[name])}" for name in missing]
    return Report(tuple(rows.values()), translation.left_out, tuple(problems))


def _stacked(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[0]
    if len(shapes) == 1 or any(shape[1:] != first[1:] for shape in shapes):
        return first
    return (sum(shape[0] for shape in shapes), *first[1:])


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, or theirs is a 1x1 convolution where ours is a Linear."""
    return found == wanted or found == (*wanted, 1, 1)


def _module(name: str) -> str:
    first, _, rest = name.partition(".")
    return first if first in ("encoder", "decoder") or not rest else f"{first}.{rest.partition('.')[0]}"
