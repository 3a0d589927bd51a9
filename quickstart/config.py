"""Configs of the quickstart: its two networks, and what its chains judge. This module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from base.bounds import Count, Seed, Weight
from base.config import ConfigError
from generator.class_conditional.config import ClassSamplingConfig
from generator.sampling_config import SamplingConfig
from tokenizer.config import RepresentationConfig, check_rebuildable


@dataclass(frozen=True)
class StandInConfig:
    """The representation model to train, and its training task."""

    representation: RepresentationConfig
    """Shape of the model; weights must be `random`."""
    num_classes: Count
    """Number of identities; each sample's json has "label", an integer in [0, num_classes)."""
    pixel_weight: Weight = 10.0
    """Weight of the pixel loss (mean absolute error): one Linear reads each patch's pixels from its token. DINOv2's
    patch tokens keep local detail. Those of a mere classifier of whole images do not, and could not be decoded."""
    seed: Seed = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        check_rebuildable(self.representation)
        if self.representation.weights != "random":
            raise ConfigError("the stand-in is trained from scratch; set representation.weights to 'random'")
        if self.num_classes < 2:
            raise ConfigError(f"num_classes is {self.num_classes}; an identity task needs at least 2")


NORM_GROUPS = 8


@dataclass(frozen=True)
class JudgeConfig:
    """Size of the judge."""

    channels: tuple[Count, Count, Count] = (24, 48, 128)  # at 2, 4 and 8 px a cell; multiples of NORM_GROUPS
    seed: Seed = 0  # seed of the initial weights

    def __post_init__(self) -> None:
        if any(width < 1 or width % NORM_GROUPS for width in self.channels):
            raise ConfigError(f"channels must be positive multiples of {NORM_GROUPS}, not {self.channels}")


@dataclass(frozen=True)
class ChainScoresConfig:
    """How many images are judged, and how they are sampled."""

    num_images: Count = 300
    """Number of held-out scenes that are reconstructed and drawn."""
    num_edits: Count = 150
    """Number of held-out edits."""
    t2i: SamplingConfig = field(default_factory=SamplingConfig)
    edit: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True)
class AblationScoresConfig:
    """Size of the comparison between variants."""

    num_images: Count = 600
    """Number of held-out scenes that are reconstructed."""
    num_probe_train: Count = 6000
    """Number of identity images that the linear probe is fitted to."""
    num_probe_test: Count = 1280
    """Number of identity images of another split that the probe is tested on."""


@dataclass(frozen=True)
class ClassScoresConfig:
    """How many images are drawn, and how."""

    num_images: Count = 440
    """Number of images drawn with each export."""
    sampling: ClassSamplingConfig = field(default_factory=ClassSamplingConfig)
