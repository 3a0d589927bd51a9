"""Validation images and their reconstructions by an autoencoder in training, as an image set that suites score.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.team import Team
from data.config import PixelConfig
from data.image_set import Item, write_image
from data.samples.images import PixelPacker
from data.shards import ShardDataset
from evaluation.metrics.reconstruction import to_uint8
from generator.draw_on_ranks import draw_on_ranks
from tokenizer.rpiae import Autoencoder

ROLES = ("original", "result")


@dataclass(frozen=True)
class _Image:
    """One image to reconstruct."""

    number: int  # index in the data set

    @property
    def key(self) -> str:
        return f"{self.number:06d}"

    @property
    def names(self) -> dict[str, str]:
        return {role: f"{role}/{self.key}.png" for role in ROLES}

    def is_done(self, out: Path) -> bool:
        return all((out / name).is_file() for name in self.names.values())


def reconstruct_samples(
    autoencoder: Autoencoder,
    dataset: ShardDataset,
    pixels: PixelConfig,
    out: Path,
    num_images: int,
    *,
    drawn_with: Mapping[str, Any],
    team: Team,
    in_step: bool = False,
) -> int:
    """Writes the first images of pixel shards as `original`, and as `result` on 8 bits (truncated); see draw_on_ranks.

    `pixels`: how images are fitted and the number in a forward pass; the crop is in the centre. Raises UserError: as
    PixelPacker.
    """
    packer = PixelPacker(pixels)
    device = next(autoencoder.parameters()).device
    images = [_Image(number) for number in range(min(num_images, len(dataset)))]

    def draw(block: Sequence[_Image]) -> tuple[Tensor, Tensor]:
        samples = dataset.read([image.number for image in block])
        originals = packer.collate(samples, step=0, stream=0, epochs=[0] * len(samples), seed=0).pixels
        with torch.no_grad():
            decoded = autoencoder.decode(autoencoder.encode(originals.to(device).float() / 255))
        return originals, to_uint8(decoded.float()).cpu()

    def write(block: Sequence[_Image], drawn: tuple[Tensor, Tensor]) -> None:
        for index, image in enumerate(block):
            for role, values in zip(ROLES, drawn, strict=True):
                write_image(out / image.names[role], values[index])

    return draw_on_ranks(
        images,
        out,
        block_images=pixels.images_per_pack,
        drawn_with={"images": dataset.fingerprint, "image_px": pixels.image_px, **drawn_with},
        start=lambda: draw,
        write=write,
        item=lambda image: Item(image.key, image.names, {}),
        team=team,
        in_step=in_step,
    )
