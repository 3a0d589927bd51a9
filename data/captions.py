"""What a sample's json says: captions or instructions, of one kind or several, or a class label."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Mapping
from typing import Any

from data.shards import Sample
from engine.config import UserError

TEXT_FIELDS = ("caption", "captions", "instruction", "instructions")


def read_captions(sample: Sample) -> list[str]:
    """The captions or instructions in the sample's json: one text, a list, or an object of kind -> text.

    Raises UserError: no json, no text, an empty text.
    """
    return [text for _, text in _named_captions(sample)]


def choose_caption(sample: Sample, draw: float, weights: Mapping[str, float]) -> str:
    """One caption by `draw` in [0, 1), each alike; with `weights`, kind -> weight >= 0, by the weight of its kind.

    A kind that the sample lacks leaves its share to the others; one that `weights` lacks is never taken.
    Raises UserError: as read_captions; no caption of these kinds.
    """
    captions = _named_captions(sample)
    if not weights:
        return captions[int(draw * len(captions))][1]
    allowed = [(weights[kind], text) for kind, text in captions if weights.get(kind, 0) > 0]
    if not allowed:
        raise UserError(
            f"{sample.where}: has captions {[kind or 'without a name' for kind, _ in captions]}, none of "
            f"packing.caption_weights {sorted(weights)}; give one of its kinds a weight"
        )
    sums = list(itertools.accumulate(weight for weight, _ in allowed))
    return allowed[bisect.bisect_right(sums, draw * sums[-1], hi=len(sums) - 1)][1]


def is_class_sample(sample: Sample) -> bool:
    """Whether the json has a class label and no text. Raises UserError: no json."""
    tree = _read_json(sample)
    return isinstance(tree.get("label"), int) and not any(name in tree for name in TEXT_FIELDS)


def _named_captions(sample: Sample) -> list[tuple[str, str]]:
    """(kind, text) of each caption; the kind is "" where the json names none."""
    tree = _read_json(sample)
    found = next((tree[name] for name in TEXT_FIELDS if name in tree), None)
    if found is None:
        raise _no_text(sample)
    if isinstance(found, Mapping):
        captions = list(found.items())
    else:
        captions = [("", text) for text in ([found] if isinstance(found, str) else found)]
    if not captions or not all(isinstance(text, str) and text.strip() for _, text in captions):
        raise UserError(f"{sample.where}: has an empty caption; reject such samples when the shards are made")
    return captions


def _read_json(sample: Sample) -> dict[str, Any]:
    try:
        tree = json.loads(sample.parts["json"])
    except (KeyError, ValueError):
        raise _no_text(sample) from None
    if not isinstance(tree, dict):
        raise _no_text(sample)
    return tree


def _no_text(sample: Sample) -> UserError:
    return UserError(f"{sample.where}: no json with one of {', '.join(TEXT_FIELDS)}; make the shards again")
