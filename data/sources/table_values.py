"""Reads numbers in tables that people bring, in every form in which tables write them.

Programs convert numbers: pandas makes integers floats if a column has gaps, CSV makes them text, databases decimals.
"""

from __future__ import annotations

import decimal
import math
import re

import numpy as np

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
MAX_WHOLE = 1 << 53  # a float64 holds every whole number up to this
MAX_SHOWN = 40  # characters of a value in a message


def number_in(value: object) -> float | None:
    """The number that `value` denotes: 9, 9.0, "9", Decimal("9"); None for null and NaN.

    Raises ValueError: not a number. True and False are not numbers, but a table's yes and no.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, str):
        value = value.strip()
        if value.lower() in ("", "nan"):
            return None
        if not NUMBER.fullmatch(value):
            raise ValueError(f"{shown(value)}, no number")
    elif isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise ValueError(f"{shown(value)}, no number")
    try:
        found = float(value)
    except (OverflowError, ValueError):  # an integer beyond all floats; a signalling NaN
        raise ValueError(f"{shown(value)}, no number") from None
    if math.isinf(found):
        raise ValueError(f"{shown(value)}, no number")
    return None if math.isnan(found) else found


def whole_number_in(value: object) -> int | None:
    """As `number_in`, for whole numbers. Raises ValueError: not a number, a fraction, or beyond 2^53."""
    found = number_in(value)
    if found is None:
        return None
    if found != int(found) or abs(found) >= MAX_WHOLE:
        raise ValueError(f"{shown(value)}, no whole number")
    return int(found)


def shown(value: object) -> str:
    """A value for a message, on one line and at most MAX_SHOWN characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
