"""Reads a sample's json: captions or instructions of one or several kinds, texts of splits, or a class label."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from base.config import UserError
from data.shards import Sample

TEXT_FIELDS = ("caption", "captions", "instruction", "instructions")
EDGES = re.compile(r"\A[\s\ufeff]+|[\s\ufeff]+\Z")
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without a visible shape


def clean_text(text: str) -> str:
    """`text` without spaces and byte order marks at its ends; "" if no character in it is visible.

    A lone surrogate, which JSON can hold and tokenizers refuse, becomes "?". Zero-width characters inside a text stay:
    they join letters and emoji.
    """
    text = EDGES.sub("", mended(text))
    return text if any(map(_is_visible, text)) else ""


def mended(text: str) -> str:
    """`text` with "?" for each lone surrogate, and otherwise unchanged."""
    return text.encode("utf-8", "replace").decode()


def half_character(text: str) -> int | None:
    """Position of the first lone surrogate (half a character) in a text; None: there is none.

    JSON can write a lone surrogate ("\\ud83d"); UTF-8 and tokenizers cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def check_whole(text: str, where: str) -> str:
    """Returns `text`. Raises UserError naming `where`: the text holds a lone surrogate."""
    place = half_character(text)
    if place is not None:
        raise UserError(f"{where} {text[:60]!a}: half a character at position {place}; write the text again")
    return text


def _is_visible(letter: str) -> bool:
    """Whether a character is visible: not a space, a control or format character, or a combining mark."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Mn", "Zs", "Zl", "Zp") and letter not in BLANKS


def read_object(payload: bytes) -> dict[str, Any]:
    """The object in a JSON text; NaN and infinities, which some writers emit although JSON lacks them, become null.

    Raises ValueError: not JSON, nested too deep, or not an object.
    """
    try:
        tree = json.loads(payload, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__}, not an object")
    return tree


def read_meta(sample: Sample) -> dict[str, Any]:
    """The sample's json, {} without one. Raises UserError naming the sample: the part is not a JSON object."""
    try:
        return read_object(sample.parts.get("json", b"{}"))
    except ValueError as error:
        raise UserError(f"{sample.where}: bad json ({error}); make this shard again") from None


def read_captions(sample: Sample) -> list[str]:
    """All captions or instructions in the sample's json, where they are a text, a list, or an object of kind -> text.

    For an interleaved sample (data/samples/layouts.py), returns the texts of its splits.

    Raises UserError: no json, no text, an empty text, or a caption that is not a text.
    """
    return [text for _, text in _named_captions(sample)]


def choose_caption(sample: Sample, draw: float, weights: Mapping[str, float]) -> str:
    """Chooses a caption with `draw`, a uniform number in [0, 1).

    Without `weights` all captions are equally likely; with `weights`, kind -> weight >= 0, a kind's weight counts. If
    the sample lacks a kind, the other kinds share its weight. A kind that `weights` lacks is never chosen.
    Raises UserError: as read_captions; no caption of a kind with a weight.
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
    return is_class(_read_json(sample))


def is_class(tree: Mapping[str, Any]) -> bool:
    """Whether a sample's json has a class label and no text; null counts as absent."""
    label = tree.get("label")
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return is_number and all(tree.get(name) is None for name in TEXT_FIELDS)


def read_label(sample: Sample, num_classes: int) -> int:
    """The class in the sample's json. Raises UserError: no json, no label, or a label outside 0 .. num_classes - 1."""
    tree = read_meta(sample)
    label = tree.get("label")
    if isinstance(label, bool) or not isinstance(label, int):
        raise UserError(
            f"{sample.where}: its json has no integer 'label'; make the shards of labelled images (folder --labels)"
        )
    if not 0 <= label < num_classes:
        name = f" (class folder '{tree['class']}')" if "class" in tree else ""
        raise UserError(
            f"{sample.where}: label {label}{name}, but num_classes is {num_classes}; set it to the data's number of "
            "classes"
        )
    return label


def split_texts(tree: Mapping[str, Any]) -> list[Any] | None:
    """The texts in json's "splits", valid or not; None without splits."""
    splits = tree.get("splits")
    if not isinstance(splits, list):
        return None
    return [split["text"] for split in splits if isinstance(split, Mapping) and "text" in split]


def _named_captions(sample: Sample) -> list[tuple[str, str]]:
    """(kind, text) of each caption; the kind is "" if the json names none."""
    tree = _read_json(sample)
    found = next((tree[name] for name in TEXT_FIELDS if tree.get(name) is not None), None)
    if found is None:
        found = split_texts(tree)
    if found is None:
        raise _no_text(sample)
    if isinstance(found, Mapping):
        captions = list(found.items())
    else:
        captions = [("", text) for text in (found if isinstance(found, list) else [found])]
    if not captions or not all(isinstance(text, str) and text.strip() for _, text in captions):
        raise UserError(
            f"{sample.where}: has an empty caption, or one that is no text; reject such samples when the "
            "shards are made"
        )
    return captions


def _read_json(sample: Sample) -> dict[str, Any]:
    try:
        return read_object(sample.parts["json"])
    except KeyError:
        raise _no_text(sample) from None
    except ValueError as error:
        raise _no_text(sample, f", but bad json ({error})") from None


def _finite(number: str) -> float | None:
    value = float(number)  # 1e999 is infinite, too
    return value if math.isfinite(value) else None


def _no_text(sample: Sample, found: str = "") -> UserError:
    return UserError(
        f"{sample.where}: no json with one of {', '.join(TEXT_FIELDS)}{found}; make the shards again"
    )
