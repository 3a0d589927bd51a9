"""The embedded real data set: Twemoji drawings composed into captioned scenes, edits, and identities.

OUT/scenes-*       KEY.png, KEY.json {"captions", "kind", "scene"}
OUT/edits-*        KEY.source.png, KEY.target.png, KEY.json {"instructions", "kind", "source_scene",
                   "target_scene", "changed"}: the changed boxes, (x0, y0, x1, y1) in pixels
OUT/identities-*   KEY.png, KEY.json {"label", "name", "background", "box"}
OUT/classes-*      KEY.png, KEY.json {"label", "name", "scene"}: one object, labelled by its index in OBJECT_NAMES

Sample i is a pure function of (seed, data set, i).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from base import files
from base.config import to_dict
from data.shards import Sample
from data.sources.draws import Draws
from quickstart.pictures.art import attribution, compose, png, render
from quickstart.pictures.captions import captions, instructions
from quickstart.pictures.config import EmojiConfig
from quickstart.pictures.edits import Edit, draw_edit, in_split
from quickstart.pictures.identities import identities
from quickstart.pictures.scenes import (
    BACKGROUND_NAMES,
    KINDS,
    OBJECT_NAMES,
    Scene,
    draw_scene,
    draw_single,
)

RECIPE = 2  # raise it when an equal config gives other samples: unfinished shards are then not continued


class EmojiSource:
    """One of the data sets; implements data.sources.base.Source."""

    def __init__(self, config: EmojiConfig, name: str, length: int) -> None:
        self.name = name  # folder name, such as "scenes-train"
        self._config = config
        self._length = length
        content, split = name.split("-")
        self._held_out = split == "validation"
        self._sample: Callable[[int], Sample] = {
            "scenes": self._scene,
            "edits": self._edit,
            "identities": self._identity,
            "classes": self._class,
        }[content]

    @property
    def description(self) -> str:
        """Attribution, and a digest of recipe and config: shards with another digest are not continued."""
        digest = files.digest([RECIPE, to_dict(self._config)])[:12]
        return f"{attribution()}; {self.name} of emoji config {digest}"

    def __len__(self) -> int:
        """Number of samples."""
        return self._length

    def sample(self, index: int) -> Sample:
        """Sample `index`; every sample is valid."""
        return self._sample(index)

    def _scene(self, index: int) -> Sample:
        scene, draws = scene_at(self._config.seed, index, held_out=self._held_out)
        image_px = self._config.image_px
        tree = {
            "captions": captions(scene, draws),
            "kind": "single" if len(scene.objects) == 1 else "pair",
            "scene": scene.describe(image_px),
        }
        return Sample(f"scene-{index:06d}", {"png": png(render(scene, image_px)), "json": _json(tree)})

    def _edit(self, index: int) -> Sample:
        edit, draws = edit_at(self._config.seed, index, held_out=self._held_out)
        image_px = self._config.image_px
        tree = {
            "instructions": instructions(edit, draws),
            "kind": edit.kind,
            "source_scene": edit.source.describe(image_px),
            "target_scene": edit.target.describe(image_px),
            "changed": edit.changed_boxes(image_px),
        }
        parts = {
            "source.png": png(render(edit.source, image_px)),
            "target.png": png(render(edit.target, image_px)),
            "json": _json(tree),
        }
        return Sample(f"edit-{index:06d}", parts)

    def _identity(self, index: int) -> Sample:
        draws = Draws(self._config.seed, self.name, index)
        label = index % self._config.num_identities
        glyph, name = identities()[label]
        image_px = self._config.image_px
        size_px = draws.between(round(0.35 * image_px), round(0.85 * image_px))
        x0, y0 = draws.between(0, image_px - size_px), draws.between(0, image_px - size_px)
        box = (x0, y0, x0 + size_px, y0 + size_px)
        background = draws.choice(BACKGROUND_NAMES)
        image = compose([(glyph, box)], background, image_px)
        tree = {"label": label, "name": name, "background": background, "box": box}
        return Sample(f"identity-{index:06d}", {"png": png(image), "json": _json(tree)})

    def _class(self, index: int) -> Sample:
        draws = Draws(self._config.seed, self.name, index)
        label = index % len(KINDS)
        scene = draw_single(draws).with_kind(0, KINDS[label])
        image_px = self._config.image_px
        tree = {"label": label, "name": OBJECT_NAMES[label], "scene": scene.describe(image_px)}
        return Sample(f"class-{index:06d}", {"png": png(render(scene, image_px)), "json": _json(tree)})


def emoji_sources(config: EmojiConfig) -> tuple[EmojiSource, ...]:
    """The data sets, in the order to make them: the longest first."""
    lengths = {
        "edits-train": config.train_edits,
        "scenes-train": config.train_scenes,
        "identities-train": config.train_identities,
        "identities-validation": config.validation_identities,
        "scenes-validation": config.validation_scenes,
        "edits-validation": config.validation_edits,
        "classes-train": config.train_classes,
        "classes-validation": config.validation_classes,
    }
    return tuple(EmojiSource(config, name, length) for name, length in lengths.items() if length)


def scene_at(seed: int, index: int, *, held_out: bool) -> tuple[Scene, Draws]:
    """Scene `index` of a split, and the draws from which its captions follow."""
    draws = Draws(seed, f"scenes held out: {held_out}", index)
    while (scene := draw_scene(draws)).held_out != held_out:
        pass
    return scene, draws


def edit_at(seed: int, index: int, *, held_out: bool) -> tuple[Edit, Draws]:
    """Edit `index` of a split, and the draws from which its instructions follow."""
    draws = Draws(seed, f"edits held out: {held_out}", index)
    while not in_split(edit := draw_edit(draws), held_out=held_out):
        pass
    return edit, draws


def _json(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True).encode()
