"""Draws images of class labels as an image set that suites score; several ranks; resumable.

The set holds result/LABEL/NUMBER.png (one folder per class), manifest.jsonl with meta.label, and sampling.json.
Labels follow each other round-robin, so the numbers of images of two classes differ by at most one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from base import files
from base.config import UserError
from base.team import ALONE, Team
from data.image_set import Item, write_image
from generator.class_conditional.config import ClassSamplingConfig
from generator.class_conditional.pipeline import ClassPipeline
from generator.draw_on_ranks import announce, draw_on_ranks, export_digest, sampling_settings

SEED_DIGITS = 15  # digits of a hexadecimal digest: 60 bits


@dataclass(frozen=True)
class ClassSetConfig:
    """What to draw, with which models, and where to write it."""

    out: Path
    """Folder of the image set."""
    generator: Path
    """Exported class-conditional generator."""
    autoencoder: str
    """The autoencoder that the generator was trained with."""
    sampling: ClassSamplingConfig
    """How images are drawn; `batch_images` is the size of a block."""
    num_images: int
    """Number of images in the whole set (50,000: 50 of each of ImageNet's classes)."""
    guide: Path | None = None
    """Exported weaker generator for AutoGuidance; None: guidance by the generator without the class."""
    device: str = "cpu"
    """Where the models run."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"{self.num_images} images; give at least 1")
        if self.guide is not None and self.sampling.guidance == 1:
            raise UserError(
                f"{self.guide}: a guide has no effect at guidance 1; give --guidance (the paper: 2.05)"
            )


@dataclass(frozen=True)
class ClassDrawing:
    """One image to draw: image `number` of class `label`."""

    label: int
    number: int
    seed: int

    @property
    def key(self) -> str:
        """Key of the image's item."""
        return f"{self.label:04d}-{self.number:05d}"

    @property
    def name(self) -> str:
        """Path of the image's file in the set."""
        return f"result/{self.label:04d}/{self.number:05d}.png"

    def is_done(self, out: Path) -> bool:
        """Whether the image's file exists."""
        return (out / self.name).is_file()


def draw_class_set(config: ClassSetConfig, team: Team = ALONE) -> int:
    """Draws with exported models (generator/draw_on_ranks.py says how). Returns the set's size.

    Raises UserError: as ClassPipeline.load; a set in `out` that was drawn with other settings.
    """
    pipeline = ClassPipeline.load(config.generator, config.autoencoder, config.guide, config.device)
    exports: dict[str, str | None] = {}
    if team.rank == 0:
        guide = None if config.guide is None else export_digest(config.guide)
        exports = {"generator": export_digest(config.generator), "guide": guide}
    return draw_classes(
        pipeline, config.out, config.sampling, config.num_images, drawn_with=exports, team=team
    )


def draw_classes(
    pipeline: ClassPipeline,
    out: Path,
    sampling: ClassSamplingConfig,
    num_images: int,
    *,
    drawn_with: Mapping[str, Any],
    team: Team,
    in_step: bool = False,
) -> int:
    """Draws like draw_on_ranks, with models in memory. `drawn_with`: on rank 0, what tells the models from others."""
    settings = sampling_settings(sampling)
    drawings = class_drawings(pipeline.generator.config.num_classes, num_images, sampling.seed)
    if team.rank == 0:
        announce(sampling)

    def draw(block: Sequence[ClassDrawing]) -> Tensor:
        return pipeline.draw([one.label for one in block], [one.seed for one in block], sampling)

    def write(block: Sequence[ClassDrawing], results: Tensor) -> None:
        for one, result in zip(block, results, strict=True):
            if not one.is_done(out):
                write_image(out / one.name, result)

    def item(one: ClassDrawing) -> Item:
        return Item(
            one.key, {"result": one.name}, {"label": one.label, "seed": one.seed, "sampling": settings}
        )

    return draw_on_ranks(
        drawings,
        out,
        block_images=sampling.batch_images,
        drawn_with={**settings, **drawn_with},
        start=lambda: draw,
        write=write,
        item=item,
        team=team,
        in_step=in_step,
    )


def class_drawings(num_classes: int, num_images: int, seed: int) -> list[ClassDrawing]:
    """The drawings, labels round-robin. An image's seed depends on (seed, label, number) alone."""
    return [
        ClassDrawing(label, number, _image_seed(seed, label, number))
        for number, label in (divmod(index, num_classes) for index in range(num_images))
    ]


def _image_seed(seed: int, label: int, number: int) -> int:
    return int(files.digest(["class image", seed, label, number])[:SEED_DIGITS], 16)
