"""Edits of emoji scenes: source and target with their objects in equal places, and the change between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from data.sources.draws import Draws
from quickstart.pictures.scenes import (
    BACKGROUND_NAMES,
    SKIN_OBJECTS,
    SKIN_TONES,
    THINGS,
    Kind,
    Placed,
    Scene,
    draw_kind,
    draw_pair,
    draw_scene,
)

EditKind = Literal["replace", "add", "remove", "background", "skin"]
PERCENT: Mapping[EditKind, int] = {"replace": 30, "add": 20, "remove": 15, "background": 20, "skin": 15}
assert sum(PERCENT.values()) == 100


@dataclass(frozen=True)
class Edit:
    """One edit. `slot` is the edited object's index in the scene that has it; None: the background is edited."""

    kind: EditKind
    source: Scene
    target: Scene
    slot: int | None

    @property
    def changed(self) -> tuple[Placed, ...]:
        """The squares in which source and target differ; none for a background edit."""
        if self.slot is None:
            return ()
        return ((self.source if self.kind == "remove" else self.target).objects[self.slot],)

    def changed_boxes(self, image_px: int) -> list[list[int]]:
        """`changed` in pixels, (x0, y0, x1, y1); for a background the whole image."""
        if self.slot is None:
            return [[0, 0, image_px, image_px]]
        return [list(placed.box(image_px)) for placed in self.changed]


def in_split(edit: Edit, *, held_out: bool) -> bool:
    """Whether the edit belongs to the split.

    Training edits start and end at combinations of the training scenes. A validation edit ends at a held-out
    combination, which no training scene and no training edit shows on either side.
    """
    if held_out:
        return edit.target.held_out
    return not edit.source.held_out and not edit.target.held_out


def draw_edit(draws: Draws) -> Edit:
    """Draws any edit, held out or not."""
    rest = draws.below(100)
    for kind, percent in PERCENT.items():
        if rest < percent:
            return DRAW[kind](draws)
        rest -= percent
    raise AssertionError("percentages add to 100")


def _draw_replace(draws: Draws) -> Edit:
    source = _silent(draw_scene(draws))
    slot = draws.below(len(source.objects))
    kind = draw_kind(draws, draws.choice([thing for thing in THINGS if thing not in _things(source)]))
    return Edit("replace", source, source.with_kind(slot, kind), slot)


def _draw_add(draws: Draws) -> Edit:
    target = draw_pair(draws)
    slot = draws.below(2)
    return Edit("add", _without(target, slot), target, slot)


def _draw_remove(draws: Draws) -> Edit:
    source = draw_pair(draws)
    slot = draws.below(2)
    return Edit("remove", source, _without(source, slot), slot)


def _draw_background(draws: Draws) -> Edit:
    source = _silent(draw_scene(draws))
    background = draws.choice([name for name in BACKGROUND_NAMES if name != source.background])
    return Edit("background", source, replace(source, background=background), None)


def _draw_skin(draws: Draws) -> Edit:
    scene = _silent(draw_scene(draws))
    slot = draws.below(len(scene.objects))
    thing = draws.choice([thing for thing in SKIN_OBJECTS if thing not in _things(scene)])
    before, after = draws.pick((None, *SKIN_TONES), 2)
    if after is None:  # yellow skin is never asked for
        before, after = after, before
    source, target = (scene.with_kind(slot, Kind(thing, skin)) for skin in (before, after))
    return Edit("skin", source, target, slot)


DRAW: Mapping[EditKind, Callable[[Draws], Edit]] = {
    "replace": _draw_replace,
    "add": _draw_add,
    "remove": _draw_remove,
    "background": _draw_background,
    "skin": _draw_skin,
}


def _things(scene: Scene) -> set[str]:
    return {placed.kind.thing for placed in scene.objects}


def _without(scene: Scene, slot: int) -> Scene:
    """The scene without object `slot`; the other object keeps its place."""
    return Scene((scene.objects[1 - slot],), scene.background)


def _silent(scene: Scene) -> Scene:
    """The scene without its caption's details: an edit's instruction names only the change."""
    return replace(scene, place=None, size_word=None)
