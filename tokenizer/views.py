"""The views of an image that are encoded (crops and their mirror images), read ahead by threads.

Shapes: I images, K crops, V views, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from base.config import UserError
from data.plan.plan import sample_uniforms
from data.samples.images import decode_image, fit_image, image_parts
from data.shards import Sample, ShardDataset

T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """View 0 is the centre crop. With mirror images, each crop is followed by its own."""

    image_px: int  # side of each view
    resize_px: int  # short side of the image before the crop
    num_crops: int
    horizontal_flip: bool
    seed: int  # seeds the corners of every crop after the first, with the sample's key and the crop's number

    def __post_init__(self) -> None:
        if self.resize_px < self.image_px:
            raise UserError(
                f"resize_px = {self.resize_px} is smaller than the autoencoder's image_px = {self.image_px}"
            )

    @property
    def num_views(self) -> int:
        """V: K, or 2 K with mirror images."""
        return self.num_crops * (2 if self.horizontal_flip else 1)

    def __str__(self) -> str:
        flips = ", mirrored" if self.horizontal_flip else ""
        corners = f" (seed {self.seed})" if self.num_crops > 1 else ""
        return f"{self.num_crops} crops of {self.image_px} px{corners} at short side {self.resize_px}{flips}"

    def crops(self, sample: Sample) -> Tensor:
        """Crops of all images of a sample, cut at equal places: uint8 [I, K, 3, H, W].

        Raises UserError naming the sample: no image, or an image that cannot be decoded.
        """
        parts = image_parts(sample.parts)
        if not parts:
            raise UserError(f"{sample.where}: has no image part; give shards of pixels")
        corners = [
            sample_uniforms(self.seed, number, sample.key)[:2] if number else None
            for number in range(self.num_crops)
        ]
        cropped = []
        for part in parts:
            image = decode_image(sample, part)
            try:
                cropped += [
                    fit_image(image, self.image_px, resize_px=self.resize_px, corner=corner)
                    for corner in corners
                ]
            except UserError as error:
                raise UserError(f"{sample.where}: '{part}': {error}") from None
        return torch.stack(cropped).unflatten(0, (len(parts), self.num_crops))  # type: ignore[no-any-return, no-untyped-call]

    def with_flips(self, crops: Tensor) -> Tensor:
        """[I, K, 3, H, W] -> [I, V, 3, H, W]"""
        if not self.horizontal_flip:
            return crops
        return torch.stack([crops, crops.flip(-1)], dim=2).flatten(1, 2)


def read_crops(
    dataset: ShardDataset, batches: Sequence[range], views: Views, num_threads: int
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Yields the samples of each batch and the crops of their images, uint8 [I, K, 3, H, W].

    Decoding releases the GIL, so threads decode side by side; samples keep their order. Raises UserError where
    ShardDataset.read or Views.crops does.
    """
    with ThreadPoolExecutor(num_threads) as decoders:
        for batch in batches:
            samples = dataset.read(batch)
            yield samples, torch.cat(list(decoders.map(views.crops, samples)))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields `items` in order; a thread makes the next item while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item
