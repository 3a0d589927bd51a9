"""VIEScore (Ku et al. 2023) as GEdit-Bench and EditScore use it: two scores for the edit, two for the picture.

SC = min(success, restraint), PQ = min(naturalness, freedom from artefacts), O = sqrt(SC PQ) of each sample, all on a
scale of 10. A group's score is the mean over its samples; the benchmark's is the unweighted mean over groups. Hence
G_O is not sqrt(G_SC G_PQ).
"""

from __future__ import annotations

import json
import math
import re

SCORES = re.compile(r"[\"']?score[\"']?\s*:\s*\[([^\]]*)\]", re.IGNORECASE)
NUM_SCORES = 2


def read_scores(text: str, scale: float) -> tuple[float, float] | None:
    """The two numbers of an answer's `"score": [a, b]`, each between 0 and `scale`; None: there are none.

    Nothing is guessed: an answer without the list, with more or fewer numbers, or beyond the scale gives None.
    """
    found = SCORES.findall(text)
    if len(found) != 1:
        return None
    try:
        values = json.loads(f"[{found[0]}]", parse_int=float)
    except (ValueError, RecursionError):
        return None
    if len(values) != NUM_SCORES or not all(type(value) is float for value in values):
        return None
    first, second = values
    if not (0 <= first <= scale and 0 <= second <= scale):
        return None
    return first, second


def sample_scores(
    edit: tuple[float, float], picture: tuple[float, float], scale: float
) -> tuple[float, float, float]:
    """SC, PQ and O of one sample, on a scale of 10."""
    sc, pq = 10 * min(edit) / scale, 10 * min(picture) / scale
    return sc, pq, math.sqrt(sc * pq)


def read_three_ratings(text: str) -> tuple[int, int, int] | None:
    """ImgEdit-Bench's ratings: an answer's three lines `Aspect: N`, N from 1 to 5; None unless exactly three."""
    found = re.findall(r"^[^:\n]*:[\s*]*([1-5])[\s*.]*(?:/\s*5)?\s*$", text, re.MULTILINE)
    if len(found) != 3:
        return None
    first, second, third = (int(value) for value in found)
    return first, second, third
