"""The interface of every feature network: distances between sets work with any of them.

Shapes: B images, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from base.tf32 import exact_fp32

IMAGES_PER_CALL = 32

BlockT_contra = TypeVar("BlockT_contra", contravariant=True)


class RowFunction(Protocol[BlockT_contra]):
    """A function that gives one row of numbers for each image, or for each element of another source."""

    @property
    def name(self) -> str:
        """The name that people read."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the rows: weights, layer, preparation of the pixels."""

    @property
    def dim(self) -> int:
        """D, the numbers in a row."""

    def __call__(self, block: BlockT_contra, /) -> Tensor:
        """A block of evaluation.image_source.Source, on the CPU -> float [B, D] on the CPU."""


class FeatureExtractor(RowFunction[Tensor], Protocol):
    """A frozen network that gives one vector for each image."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Network, layer and preparation in words, as JSON values."""

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """uint8 [B, 3, H, W], any size, on the CPU -> float32 [B, D] on the CPU."""


@exact_fp32()
def extract(extractor: FeatureExtractor, pixels: Tensor) -> Tensor:
    """Features of uint8 [N, 3, H, W], a few images at a time: float32 [N, D]."""
    assert len(pixels), "no images, no features"
    return torch.cat([extractor(part) for part in torch.split(pixels, IMAGES_PER_CALL)])
