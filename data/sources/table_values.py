"""Numbers in tables that people bring: every way in which a table writes one, and nothing that is none.

On the way programs turn numbers into others: pandas makes integers floats where a column has holes, CSV makes them
text, databases decimals.
"""

from __future__ import annotations

import decimal
import math
import re

import numpy as np

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
MAX_WHOLE = 1 << 53  # floats hold every whole number below it
MAX_SHOWN = 40  # letters of a value in a message


def number_in(value: object) -> float | None:
    """The number that `value` means: 9, 9.0, "9", Decimal("9"); None for null and NaN.

    Raises ValueError: it means none. True and False are none: a table that has them says yes and no.
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
    """As `number_in`, a whole number. Raises ValueError: none, a fraction, beyond 2^53."""
    found = number_in(value)
    if found is None:
        return None
    if found != int(found) or abs(found) >= MAX_WHOLE:
        raise ValueError(f"{shown(value)}, no whole number")
    return int(found)


def shown(value: object) -> str:
    """A value for a message: on one line, and short."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
