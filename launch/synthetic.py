"""Random images in place of shards, to measure a training before its data are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.images import PixelBatch, PixelConfig

PACKS_PER_RANK = 2
"""More than one, so that gradients are accumulated as in most real runs."""


class SyntheticPixels:
    """Packs of a config's size, the same every step. Implements engine.objective.BatchSource."""

    def __init__(self, config: PixelConfig, rank: int, world: int) -> None:
        self.num_streams = PACKS_PER_RANK * world
        self._config = config
        self._streams = range(rank, self.num_streams, world)

    def pixels(self, num_images: int, seed: int = 0) -> Tensor:
        """Noise, uint8 [num_images, 3, image_px, image_px]."""
        shape = (num_images, 3, self._config.image_px, self._config.image_px)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    def next_step(self) -> Sequence[PixelBatch]:
        """One pack for each of this rank's streams."""
        names = tuple(f"synthetic-{index}" for index in range(self._config.images_per_pack))
        meta: tuple[dict[str, Any], ...] = tuple({} for _ in names)
        return [PixelBatch(self.pixels(len(names), s), names, s, meta) for s in self._streams]

    def state_dict(self) -> dict[str, Any]:
        """There is nothing to remember."""
        return {"fingerprint": "synthetic", "streams": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up."""

    def metrics(self) -> Mapping[str, float]:
        """Images of a step on this rank."""
        return {"samples": float(self._config.images_per_pack * len(self._streams))}

    def close(self) -> None:
        """Nothing is open."""
