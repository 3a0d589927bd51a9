"""The form of a row in the table of identities: a key, what it must follow, and what must not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Identity:
    """A hash, key, fingerprint or digest. `make(folder, **inputs)` gives its value; it may write to the empty `folder`.

    Every input has another value in `changed`: a value of another key in each case.
    """

    name: str
    """The function or attribute, as `folder.module.Class.name`."""
    make: Callable[..., object]
    inputs: Mapping[str, Any]
    changed: Mapping[str, Any]
    same: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """What must not matter, in words -> inputs of an equal key."""
    through: Sequence[str] = ()
    """Further functions of the sources that this row calls, as `folder.module.Class.name`."""


def fields_identity(
    name: str,
    config: Any,
    of: Callable[[Any], object],
    changed: Mapping[str, Any],
    ignored: Mapping[str, Any] | None = None,
    **more: Any,
) -> Identity:
    """The row of a key that follows every field of the dataclass `config`, but for those of `ignored`."""
    inputs = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ignored = ignored or {}
    return Identity(
        name,
        lambda folder, **values: of(dataclasses.replace(config, **values)),
        {field: value for field, value in inputs.items() if field not in ignored},
        changed,
        {field: {field: value} for field, value in ignored.items()},
        **more,
    )


def values(rows: Sequence[Identity], folder: Path) -> list[str]:
    """What every row gives, as text, each made in a folder of its own."""
    found = []
    for number, row in enumerate(rows):
        place = folder / str(number)
        place.mkdir(parents=True)
        found.append(f"{row.name} {row.make(place, **row.inputs)!r}")
    return found
