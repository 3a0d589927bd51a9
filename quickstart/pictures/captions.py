"""Words for emoji scenes and edits.

Every caption names all objects and the background, so a caption determines the combination. The captions of
held-out combinations therefore never occur in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.sources.draws import Draws
from quickstart.pictures.edits import Edit
from quickstart.pictures.scenes import Kind, Place, Relation, Scene

CAPTIONS_PER_SCENE = 2
INSTRUCTIONS_PER_EDIT = 2

# {a}, {b}: objects with their article; {bg}: "a blue background".
SINGLE: Mapping[Place | None, Sequence[str]] = {
    None: ("{a} on {bg}", "{bg} with {a}", "{a} in front of {bg}"),
    "center": ("{a} in the center of {bg}", "{bg} with {a} in the center", "{a} in the middle of {bg}"),
    "left": ("{a} on the left side of {bg}", "{bg} with {a} on the left", "{a} near the left edge of {bg}"),
    "right": (
        "{a} on the right side of {bg}",
        "{bg} with {a} on the right",
        "{a} near the right edge of {bg}",
    ),
    "top": ("{a} at the top of {bg}", "{bg} with {a} at the top", "{a} near the top edge of {bg}"),
    "bottom": (
        "{a} at the bottom of {bg}",
        "{bg} with {a} at the bottom",
        "{a} near the bottom edge of {bg}",
    ),
}
PAIR: Mapping[Relation, Sequence[str]] = {
    "left": (
        "{a} to the left of {b} on {bg}",
        "{b} to the right of {a} on {bg}",
        "{bg} with {a} on the left and {b} on the right",
        "{a} next to {b} on {bg}",
    ),
    "above": (
        "{a} above {b} on {bg}",
        "{b} below {a} on {bg}",
        "{bg} with {a} at the top and {b} at the bottom",
        "{a} and {b} on {bg}",
    ),
}
# {a}: new object; {old}, {other}: "the dog"; {where}: "to the left of"; {bg}: "blue"; {skin}: "dark".
INSTRUCTIONS: Mapping[str, Sequence[str]] = {
    "replace": ("replace {old} with {a}", "change {old} into {a}", "swap {old} for {a}"),
    "add": ("add {a} {where} {other}", "put {a} {where} {other}", "place {a} {where} {other}"),
    "remove": ("remove {old}", "take away {old}", "delete {old}"),
    "background": ("make the background {bg}", "change the background to {bg}", "use a {bg} background"),
    "skin": (
        "give {old} {skin} skin",
        "change the skin tone of {old} to {skin}",
        "make the skin of {old} {skin}",
    ),
}
WHERE: Mapping[tuple[Relation, int], str] = {
    ("left", 0): "to the left of",
    ("left", 1): "to the right of",
    ("above", 0): "above",
    ("above", 1): "below",
}


def captions(scene: Scene, draws: Draws) -> list[str]:
    """Captions of one scene in different words."""
    things = [with_article(_sized(placed.kind, scene)) for placed in scene.objects]
    background = with_article(f"{scene.background} background")
    if len(things) == 1:
        templates = SINGLE[scene.place]
    else:
        assert scene.relation is not None
        templates = PAIR[scene.relation]
    words = dict(zip("ab", things, strict=False), bg=background)
    return [template.format(**words) for template in draws.pick(templates, CAPTIONS_PER_SCENE)]


def instructions(edit: Edit, draws: Draws) -> list[str]:
    """Instructions for one edit in different words. Objects already there are named without their skin tone."""
    words = {"bg": edit.target.background}
    if edit.slot is not None:
        has_it = edit.target if edit.kind == "add" else edit.source
        words["old"] = f"the {has_it.objects[edit.slot].kind.thing}"
        if edit.kind == "add":
            assert edit.target.relation is not None
            words["where"] = WHERE[edit.target.relation, edit.slot]
            words["other"] = f"the {edit.source.objects[0].kind.thing}"
        if edit.kind != "remove":
            new = edit.target.objects[edit.slot].kind
            words["a"] = with_article(new.name)
            words["skin"] = new.skin or ""
    templates = draws.pick(INSTRUCTIONS[edit.kind], INSTRUCTIONS_PER_EDIT)
    return [template.format(**words) for template in templates]


def with_article(phrase: str) -> str:
    """The phrase with its article: a dog, an octopus."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _sized(kind: Kind, scene: Scene) -> str:
    return kind.name if scene.size_word is None else f"{scene.size_word} {kind.name}"
