"""Emoji scenes: the possible objects and places, and the combinations kept for validation.

Lengths are in units of 1/64 of the image side: pixels at 64 px.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from data.shards.index import key_hash
from data.sources.draws import Draws

CANVAS = 64
HELD_OUT_SHARE = 10  # one combination in this many is for validation
SINGLE_PERCENT = 60  # share of scenes with one object; the others show two

# Objects that differ clearly in colour and shape at 28 px.
PLAIN_OBJECTS: Mapping[str, str] = {
    "red apple": "🍎",
    "bunch of grapes": "🍇",
    "hamburger": "🍔",
    "donut": "🍩",
    "mushroom": "🍄",
    "carrot": "🥕",
    "dog": "🐶",
    "cat": "🐱",
    "frog": "🐸",
    "pig": "🐷",
    "panda": "🐼",
    "fox": "🦊",
    "penguin": "🐧",
    "octopus": "🐙",
    "butterfly": "🦋",
    "elephant": "🐘",
    "robot": "🤖",
    "red car": "🚗",
    "rocket": "🚀",
    "crescent moon": "🌙",
    "star": "⭐",
    "rainbow": "🌈",
    "pine tree": "🌲",
    "sunflower": "🌻",
    "guitar": "🎸",
    "soccer ball": "⚽",
    "basketball": "🏀",
    "umbrella": "☂",
    "crown": "👑",
    "red heart": "❤",
    "house": "🏠",
    "diamond": "💎",
}
# Objects with Unicode's skin tones; without a tone they are yellow.
SKIN_OBJECTS: Mapping[str, str] = {
    "waving hand": "👋",
    "thumbs up": "👍",
    "baby": "👶",
}
SKIN_TONES: Mapping[str, str] = {"light": "🏻", "medium": "🏽", "dark": "🏿"}
# Shades on which every object of the lists stands out (most are darker or lighter than the emoji's own palette).
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "red": (152, 14, 30),
    "green": (18, 80, 46),
    "teal": (24, 142, 142),
    "blue": (30, 62, 160),
    "purple": (78, 34, 120),
    "pink": (226, 96, 164),
    "gray": (120, 124, 132),
    "white": (248, 248, 248),
}
Place = Literal["center", "left", "right", "top", "bottom"]
PLACES: tuple[Place, ...] = ("center", "left", "right", "top", "bottom")
Relation = Literal["left", "above"]
SizeWord = Literal["small", "large"]
SIZES: Mapping[SizeWord | None, int] = {"small": 28, None: 36, "large": 44}  # sides of an object's square


@dataclass(frozen=True)
class Kind:
    """The kind of an object: what it is, and its skin tone."""

    thing: str  # key of PLAIN_OBJECTS or SKIN_OBJECTS
    skin: str | None = None  # key of SKIN_TONES

    @property
    def name(self) -> str:
        """The class name, such as "waving hand with dark skin"."""
        return self.thing if self.skin is None else f"{self.thing} with {self.skin} skin"

    @property
    def glyph(self) -> str:
        """The kind's Unicode characters."""
        if self.thing in PLAIN_OBJECTS:
            return PLAIN_OBJECTS[self.thing]
        return SKIN_OBJECTS[self.thing] + ("" if self.skin is None else SKIN_TONES[self.skin])


THINGS: tuple[str, ...] = (*PLAIN_OBJECTS, *SKIN_OBJECTS)
KINDS: tuple[Kind, ...] = (
    *(Kind(thing) for thing in THINGS),
    *(Kind(thing, skin) for thing in SKIN_OBJECTS for skin in SKIN_TONES),
)
OBJECT_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)
BACKGROUND_NAMES: tuple[str, ...] = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Placed:
    """An object in its square; x0 and y0 are the upper left corner."""

    kind: Kind
    x0: int
    y0: int
    size: int

    def box(self, image_px: int) -> tuple[int, int, int, int]:
        """The square's (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive."""
        x0, y0, size = (round(v * image_px / CANVAS) for v in (self.x0, self.y0, self.size))
        return x0, y0, x0 + size, y0 + size


@dataclass(frozen=True)
class Scene:
    """One or two objects on a flat background.

    The first of two objects is to the left of or above the second. `place` and `size_word` are what a caption says
    about a single object; None: the caption does not say it.
    """

    objects: tuple[Placed, ...]
    background: str
    relation: Relation | None = None
    place: Place | None = None
    size_word: SizeWord | None = None

    @property
    def combination(self) -> str:
        """What the scene shows, whatever the places: the unit of the split."""
        return " + ".join(sorted(placed.kind.name for placed in self.objects)) + " on " + self.background

    @property
    def held_out(self) -> bool:
        """Whether the combination belongs to validation; independent of the seed."""
        return key_hash(self.combination) % HELD_OUT_SHARE == 0

    def describe(self, image_px: int) -> dict[str, Any]:
        """The ground truth for a judge as JSON values: names, boxes in pixels, background, relation."""
        objects = [
            {
                "name": placed.kind.name,
                "thing": placed.kind.thing,
                "skin": placed.kind.skin,
                "box": list(placed.box(image_px)),
            }
            for placed in self.objects
        ]
        return {"objects": objects, "background": self.background, "relation": self.relation}

    def with_kind(self, slot: int, kind: Kind) -> Scene:
        """The scene with another object in the place of object `slot`."""
        objects = list(self.objects)
        objects[slot] = replace(objects[slot], kind=kind)
        return replace(self, objects=tuple(objects))


def draw_scene(draws: Draws) -> Scene:
    """Draws any scene, held out or not."""
    return draw_single(draws) if draws.chance(SINGLE_PERCENT) else draw_pair(draws)


def draw_single(draws: Draws) -> Scene:
    """Draws one object of 28, 36 or 44: in the centre, or not large and near the middle of an edge."""
    spot = "center" if draws.chance(50) else draws.choice(PLACES)
    words: tuple[SizeWord | None, ...] = (None, None, "small", "large")
    size_word = draws.choice(words if spot == "center" else words[:3])
    size = SIZES[size_word]
    middle, far = (CANVAS - size) // 2, CANVAS - size
    x0, y0 = middle + _jitter(draws), middle + _jitter(draws)
    edge = 3 + _jitter(draws)
    x0 = {"left": edge, "right": far - edge}.get(spot, x0)
    y0 = {"top": edge, "bottom": far - edge}.get(spot, y0)
    # A caption always names an edge and rarely the centre: an object without a named place is in the centre.
    place = spot if spot != "center" or draws.chance(20) else None
    placed = Placed(draw_kind(draws, draws.choice(THINGS)), x0, y0, size)
    return Scene((placed,), draws.choice(BACKGROUND_NAMES), place=place, size_word=size_word)


def draw_pair(draws: Draws) -> Scene:
    """Draws two different small objects, one in the middle of each half of the image."""
    relation: Relation = draws.choice(("left", "above"))
    size, half = SIZES["small"], CANVAS // 2
    objects = []
    for index, thing in enumerate(draws.pick(THINGS, 2)):
        along = index * half + (half - size) // 2 + _jitter(draws)
        across = (CANVAS - size) // 2 + _jitter(draws)
        x0, y0 = (along, across) if relation == "left" else (across, along)
        objects.append(Placed(draw_kind(draws, thing), x0, y0, size))
    return Scene(tuple(objects), draws.choice(BACKGROUND_NAMES), relation=relation)


def _jitter(draws: Draws) -> int:
    return draws.between(-1, 1)


def draw_kind(draws: Draws, thing: str) -> Kind:
    """`thing` without skin tone or, if Unicode has tones for it, in one of the tones or none."""
    return Kind(thing, draws.choice((None, *SKIN_TONES)) if thing in SKIN_OBJECTS else None)
