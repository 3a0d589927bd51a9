"""GenEval's rules (Ghosh et al. 2023): is an image right, given the objects a detector found in it?

A prompt's metadata has `include`, clauses {"class", "count", "color"?, "position"?: [relation, index of an earlier
clause]} that must all hold, and `exclude`, clauses {"class", "count"} of which none may hold. Only the `count` most
certain objects of a class are tested for colours and positions. Scores are compared in fp32, as the official code
does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from base.config import UserError

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_SHOWN = 200  # characters of a clause in a message
MAX_OBJECTS = 16  # limit for each class
POSITION_SLACK = 0.1  # as a share of the sum of both sizes
POSITION_THRESHOLD = 0.5  # least normalised offset
RELATIONS = ("left of", "right of", "above", "below")
STANDING_STILL_PX = 1e-3
NUM_PROMPTS, IMAGES_PER_PROMPT = 553, 4


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    name: str
    score: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1, pixels
    colour: str | None = None  # None: the colour was not asked for

    @property
    def centre(self) -> tuple[float, float]:
        """x, y of the box's centre, pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Width, height of the box, pixels."""
        x0, y0, x1, y1 = self.box
        return abs(x1 - x0), abs(y1 - y0)


def threshold_of(tag: str) -> float:
    """Score that an object must exceed. Raises UserError: a tag that GenEval does not have."""
    if tag not in TAGS:
        raise UserError(f"tag '{tag}': GenEval has {', '.join(TAGS)}; take the metadata of its prompt file")
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def check_metadata(metadata: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming `where`: a tag that GenEval does not have, malformed clauses."""
    tag = metadata.get("tag")
    threshold_of(tag if isinstance(tag, str) else repr(tag))
    for kind in ("include", "exclude"):
        clauses = metadata.get(kind) or []
        if not isinstance(clauses, list):
            raise UserError(
                f"{where}: {kind} is no list of clauses; take the metadata of GenEval's prompt file"
            )
        for place, clause in enumerate(clauses):
            if not isinstance(clause, Mapping) or not {"class", "count"} <= clause.keys():
                raise UserError(f"{where}: clause {str(clause)[:MAX_SHOWN]} has no class and count")
            position = clause.get("position", ["", 0])
            is_good = type(clause["count"]) is int and isinstance(clause["class"], str)
            is_good &= isinstance(clause.get("color", ""), str)
            is_good &= isinstance(position, list) and list(map(type, position)) == [str, int]
            if not is_good or ("position" in clause and not 0 <= position[1] < place):
                raise UserError(
                    f"{where}: clause {str(clause)[:MAX_SHOWN]} has another class, count, color or position than "
                    "GenEval's; take the metadata of its prompt file"
                )


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Objects above the tag's score, by class, the most certain first, at most MAX_OBJECTS a class."""
    least = np.float32(threshold_of(tag))
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda detection: -detection.score):
        if np.float32(one.score) > least:
            found.setdefault(one.name, []).append(one)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def verdict(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> tuple[bool, list[str]]:
    """Whether the image is right, and the reasons if it is wrong. `metadata`: checked (`check_metadata`)."""
    objects = kept(detections, str(metadata["tag"]))
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []  # by clause; None: the clause does not hold
    for clause in metadata.get("include") or []:
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        problems = _problems(clause, found, matched)
        reasons += problems
        matched.append(None if problems else found)
    for clause in metadata.get("exclude") or []:
        name, count = clause["class"], clause["count"]
        if len(objects.get(name, [])) >= count:
            reasons.append(f"expected fewer than {count} {name}, found {len(objects[name])}")
    return not reasons, reasons


def _problems(
    clause: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[list[Detection] | None]
) -> list[str]:
    """Why `found`, the most certain objects of the clause's class, do not fulfil the clause."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return [f"expected {count} {name}, found {len(found)}"]
    if "color" in clause:
        colours = [one.colour for one in found]
        if colours.count(clause["color"]) < count:
            seen = ", ".join(str(colour) for colour in colours)
            return [f"expected {count} {clause['color']} {name}, found {seen}"]
    if "position" in clause:
        relation, target = clause["position"]
        others = matched[target]
        if others is None:
            return [f"no target for {name} to be {relation}"]
        for one in found:
            for other in others:
                seen_relations = relations(one, other)
                if relation not in seen_relations:
                    seen = " and ".join(sorted(seen_relations)) or "in no direction of"
                    return [f"expected {name} {relation} the {other.name}, found it {seen}"]
    return []


def relations(one: Detection, other: Detection) -> set[str]:
    """The relations of `one` to `other`, such as "left of".

    The offset of the centres, less a tenth of both sizes, is divided by the length of the whole offset. A direction
    holds if the quotient is more than one half.
    """
    offset = np.subtract(one.centre, other.centre)
    slack = POSITION_SLACK * np.add(one.size, other.size)
    rest = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if np.all(np.abs(rest) < STANDING_STILL_PX):
        return set()
    dx, dy = rest / np.linalg.norm(offset)
    holds = (
        dx < -POSITION_THRESHOLD,
        dx > POSITION_THRESHOLD,
        dy < -POSITION_THRESHOLD,
        dy > POSITION_THRESHOLD,
    )
    return {relation for relation, is_so in zip(RELATIONS, holds, strict=True) if is_so}


def coloured(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> list[Detection]:
    """Objects whose colours the rules will ask for."""
    objects = kept(detections, str(metadata["tag"]))
    return [
        one
        for clause in metadata.get("include") or []
        if "color" in clause
        for one in objects.get(clause["class"], [])[: clause["count"]]
    ]
