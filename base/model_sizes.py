"""Limits of the model sizes in configs, so that one line of JSON cannot fill a machine's memory."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from base.errors import UserError

LIMITS = (
    (r"layers?|depths?|levels?|blocks|num_block", 1 << 10),  # the deepest published models have some 200
    (
        r"px|(img|image|patch|window|kernel)_size|max_side",
        1 << 14,
    ),  # MAX_PIXELS of data/samples/images.py: 2^13 square
    (
        r"width|dims?|(hidden|intermediate)_size|channels?|multipliers|groups|heads?",
        1 << 17,
    ),  # published: 2^16
    (r"vocab_size|classes|registers?|queries|experts", 1 << 20),  # the largest vocabularies have 2^18
)
"""Pattern of words in a field's name -> the largest value that is built. The first matching pattern counts."""
MAX_LISTED = 1 << 10
"""Most values of a field that lists one value for each layer."""


def check_sizes(tree: Mapping[Any, Any], where: str) -> None:
    """Checks every field below `tree`. Raises UserError naming `where`, field and limit: a size is beyond its limit."""
    todo: list[tuple[str, Any]] = [("", tree)]
    seen: set[int] = set()  # a YAML alias may refer to its own parent
    while todo:
        name, value = todo.pop()
        if isinstance(value, Mapping):
            if id(value) not in seen:
                seen.add(id(value))
                todo += [(str(key), item) for key, item in value.items()]
        else:
            check_size(name, value, where)


def check_size(name: str, value: Any, where: str) -> None:
    """Checks one field, a number or a list of numbers. Raises UserError: as check_sizes."""
    limit = limit_of(name)
    if limit is None:
        return
    values = value if isinstance(value, list | tuple) else (value,)
    if len(values) > MAX_LISTED:
        raise UserError(f"{where}: {name} lists {len(values):,} values; at most {MAX_LISTED:,} are built")
    for number in values:
        if isinstance(number, int) and number > limit:
            raise UserError(f"{where}: {name} is {number:,}; no model with more than {limit:,} is built")


@functools.lru_cache(maxsize=4096)
def limit_of(name: str) -> int | None:
    """The largest value of a field of this name; None: the name is not a model's size."""
    found = (limit for words, limit in LIMITS if re.search(rf"(?:^|_)(?:{words})(?:_|$)", name.lower()))
    return next(found, None)
