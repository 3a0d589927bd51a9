"""Config of the emoji data sets. This module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from base.bounds import Amount, Count, Seed
from base.config import ConfigError
from quickstart.pictures.identities import identities
from quickstart.pictures.scenes import CANVAS


@dataclass(frozen=True)
class EmojiConfig:
    """Sizes and seed of the emoji data sets."""

    image_px: Count = 64
    """Side of the square images, pixels."""
    seed: Seed = 0
    """Seed of every draw. The split into training and validation does not depend on it."""
    train_scenes: Count = 16000
    validation_scenes: Count = 600
    train_edits: Count = 10000
    validation_edits: Count = 200
    num_identities: Count = 160
    """Number of emoji that the stand-in representation model learns to tell apart."""
    train_identities: Count = 8000
    """Number of identity images, spread evenly over the identities."""
    validation_identities: Count = 320
    train_classes: Amount = 0
    """Number of scenes of one object with a class label, spread evenly over OBJECT_NAMES; 0: no such set. All
    combinations are in it: a class is asked for, not its combination with a background."""
    validation_classes: Amount = 0
    max_samples_per_shard: Count = 2000

    def __post_init__(self) -> None:
        if self.image_px < CANVAS // 2:
            raise ConfigError(f"image_px is {self.image_px}; emoji need at least {CANVAS // 2}")
        for name in ("train_scenes", "validation_scenes", "train_edits", "validation_edits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if min(self.train_classes, self.validation_classes) < 0:
            raise ConfigError("train_classes and validation_classes must be at least 0")
        for name in ("train_identities", "validation_identities"):
            if getattr(self, name) < self.num_identities:
                raise ConfigError(f"{name} is less than num_identities; some would have no image")
        if not 2 <= self.num_identities <= len(identities()):
            raise ConfigError(f"num_identities must be in 2 .. {len(identities())}")
