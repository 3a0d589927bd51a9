"""Batches of a fixed number of latent images with class labels, for class-conditional generation.

Shapes: B images, C latent channels, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.config import ClassPackingConfig
from data.packs.transfer import to_device
from data.plan.plan import pack_seed, sample_uniforms
from data.samples.captions import read_label
from data.samples.latents import check_has_variance, check_latent_shards, latent_seed, read_latents
from data.samples.layouts import LATENT_SUFFIX
from data.shards import LatentInfo, Sample, ShardDataset


@dataclass(frozen=True)
class ClassBatch:
    """Latent images and labels of one micro-batch."""

    latents: Tensor  # fp32 [B, C, Y, X], normalised
    labels: Tensor  # int64 [B]; num_classes: the class is dropped
    sample_ids: tuple[str, ...]
    seed: int  # 63 bits, from (run seed, global step, stream)

    def to(self, device: torch.device) -> ClassBatch:
        """A copy with the tensors on `device`."""
        return to_device(self, device)


class ClassPacker:
    """Packs shards with KEY.latent and KEY.json {"label"}. Every sample has length 1. Implements Packer.

    (seed, epoch, sample) determines the class dropout and the view of an image (its mirror image, if stored).
    """

    budget_key = "packing.images_per_pack"

    def __init__(self, config: ClassPackingConfig, latent: LatentInfo, num_classes: int) -> None:
        if config.sample_latents:
            check_has_variance(latent)
        self.budget = config.images_per_pack
        self._config, self._latent, self._num_classes = config, latent, num_classes

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Ones, int64 [len(dataset)]. Raises UserError: shards of pixels, or latents that are not this packer's."""
        check_latent_shards(dataset, self._latent)
        return np.ones(len(dataset), np.int64)

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> ClassBatch:
        """Makes one batch of `samples`, each met in its epoch of `epochs`; `seed`: the run's seed.

        Raises UserError naming shard and key: the latent is missing or of another size, or the label is missing or out
        of range.
        """
        met = [(epoch, sample.key) for sample, epoch in zip(samples, epochs, strict=True)]
        draws = [sample_uniforms(seed, epoch, key) for epoch, key in met]
        # Dropped labels are read, too, so that a bad label shows up in the first epoch.
        labels = [read_label(sample, self._num_classes) for sample in samples]
        kept = [dropout >= self._config.class_dropout for _, dropout, _, _ in draws]
        latents = read_latents(
            samples,
            [LATENT_SUFFIX],
            self._latent,
            views=[int(view * self._latent.num_views) for _, _, _, view in draws],
            seeds=[latent_seed(seed, *one) for one in met] if self._config.sample_latents else None,
        )
        return ClassBatch(
            latents=latents[:, 0],
            labels=torch.tensor(
                [label if keep else self._num_classes for label, keep in zip(labels, kept, strict=True)]
            ),
            sample_ids=tuple(sample.key for sample in samples),
            seed=pack_seed(seed, step, stream),
        )
