"""Configs of data: the section `data` of a training, and what a pack holds. This module needs no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from base.bounds import MAX_COUNT, Count, Few, Seconds, Seed, Share, Weight
from base.config import ConfigError


@dataclass(frozen=True)
class StorageConfig:
    """Settings for reading remote shards (s3://, gs://, https://, hf://, ...). Local folders ignore them."""

    cache_dir: str | None = None
    """Folder on a local disk for cached blocks, which the ranks of a node share; None: in the user's cache folder."""
    cache_gib: Weight = 50.0
    """Bound of the cached blocks, GiB. The indices (76 bytes a sample) come on top and are never evicted."""
    attempts: Few = 5
    """Attempts of one request, with growing waits between them, before the run ends."""
    timeout_s: Seconds = 60.0
    """Time limit of one attempt, if the storage's client has such a setting."""
    parallel_reads: Few = 8
    """Requests in flight for each data set and rank."""

    def __post_init__(self) -> None:
        for name in ("attempts", "parallel_reads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("cache_gib", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, not {getattr(self, name)}")

    @property
    def cache(self) -> Path:
        """The cache folder: `cache_dir`, or rpiae/shards in the user's cache folder."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpiae" / "shards"


@dataclass(frozen=True)
class SetConfig:
    """Config of one data set of a mixture."""

    shards: str
    """Directory (or fsspec url) with manifest.json."""
    weight: Weight = 1.0
    """Weight of the set when samples are drawn, relative to the other sets' weights."""
    quarantine: str | None = None
    """File of samples to leave out, as `make_shards.py doctor --quarantine` writes it."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(
                f"{self.shards}: weight is {self.weight}; give more than 0, or leave the set out"
            )


@dataclass(frozen=True)
class DataConfig:
    """The section `data` of a training's config: data sets, streams and seed."""

    shards: str | None = None
    """Directory (or fsspec url) with manifest.json. Give either `shards` or `mixture`."""
    quarantine: str | None = None
    """File of samples of `shards` to leave out, as `make_shards.py doctor --quarantine` writes it."""
    mixture: dict[str, SetConfig] = field(default_factory=dict)
    """Several data sets by name, instead of `shards`."""
    num_streams: Count = 8
    """Packs per global step; at least the largest number of ranks that this run may ever have."""
    seed: Seed = 0
    """Seed of the order and of every random choice about samples, noise and timesteps."""
    max_epochs: Count | None = None
    """The training ends before it meets any sample more often than this, or at `engine.steps` if that comes first."""
    prefetch_steps: Few = 2
    """Number of global steps that each rank's thread reads ahead."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        for name in ("num_streams", "prefetch_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ConfigError(f"max_epochs must be at least 1, not {self.max_epochs}")
        if (self.shards is None) == (not self.mixture):
            raise ConfigError("give either shards or mixture (several sets by name)")
        if self.quarantine is not None and self.mixture:
            raise ConfigError("quarantine belongs to shards; in a mixture every set has its own")

    @property
    def sets(self) -> dict[str, SetConfig]:
        """The sets of the mixture by name; {"": the only set} for `shards`."""
        return self.mixture or {"": SetConfig(str(self.shards), quarantine=self.quarantine)}


@dataclass(frozen=True)
class PixelConfig:
    """Config of batches of image files."""

    images_per_pack: Count  # images in one micro-batch of one rank
    image_px: Count  # side of the square that the model sees, pixels
    resize_px: Count | None = None  # short side before the crop, pixels; None: image_px
    crop: Literal["center", "random"] = "center"  # random: determined by (seed, epoch, sample)

    def __post_init__(self) -> None:
        if self.images_per_pack < 1 or self.image_px < 1:
            raise ConfigError("images_per_pack and image_px must be positive")
        if self.images_per_pack > MAX_COUNT:
            raise ConfigError(f"images_per_pack is {self.images_per_pack}; at most {MAX_COUNT}")
        if self.resize_px is not None and self.resize_px < self.image_px:
            raise ConfigError(f"resize_px = {self.resize_px} is smaller than image_px = {self.image_px}")


@dataclass(frozen=True)
class PackingConfig:
    """Config of packs of text-to-image and edit samples."""

    tokens_per_pack: Count  # budget of one pack, in tokens; a pack is a micro-batch of one rank
    max_side: Count = 64  # rows of the position table per axis, latent pixels; at least the latents' Y and X
    # Probability of dropping a condition (classifier-free guidance), drawn separately for each text and each clean
    # image of a sample. A text with a loss is never dropped. The defaults are those of Bagel's fine-tuning.
    text_dropout: Share = 0.1
    source_dropout: Share = 0.3
    # Kind of caption -> weight, for captions with names; other kinds are never taken. Empty: all captions weigh alike.
    caption_weights: dict[str, Weight] = field(default_factory=dict)
    sample_latents: bool = False  # draw z with its stored variance, anew each epoch; False: z is the mean
    # Number of noisy images that share one prefix, its caption and its dropout: a target with that many timesteps and
    # noises, of which each costs little more than its own tokens. A sample with several targets draws each once; extra
    # draws are assigned round-robin.
    draws_per_caption: Few = 1

    def __post_init__(self) -> None:
        for name in ("tokens_per_pack", "max_side", "draws_per_caption"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        weights = self.caption_weights.values()
        if weights and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
            raise ConfigError(
                f"caption_weights {self.caption_weights}: give weights of at least 0, one of them above 0"
            )
        for name in ("text_dropout", "source_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")


@dataclass(frozen=True)
class ClassPackingConfig:
    """Config of batches of labelled latents."""

    images_per_pack: Count  # images in one micro-batch of one rank
    class_dropout: Share = 0.1  # probability of dropping the class (classifier-free guidance)
    sample_latents: bool = False  # draw z with its stored variance, anew each epoch; False: z is the mean

    def __post_init__(self) -> None:
        if self.images_per_pack < 1:
            raise ConfigError(f"images_per_pack is {self.images_per_pack}; give at least 1")
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"class_dropout must be in [0, 1), not {self.class_dropout}")
