"""Image files -> pixels: decode, resize, crop; and batches of pixels for the tokenizer.

Shapes: B images, H = W = image_px.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.captions import read_meta
from data.plan import pack_seed, sample_uniforms
from data.shards import Sample, ShardDataset
from data.transfer import to_device
from engine.config import ConfigError, UserError

IMAGE_PARTS = ("png", "jpg", "jpeg", "webp")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
)  # as Pillow names them; it knows many more, with more ways to go wrong
MAX_PIXELS = 1 << 26  # of a file's image, and of one resized: 8192 x 8192
# What Pillow raises for damaged files.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class PixelBatch:
    """Images of one micro-batch."""

    pixels: Tensor  # uint8 [B, 3, H, W]
    sample_ids: tuple[str, ...]
    seed: int  # 63 bits, of (run seed, global step, stream)
    meta: tuple[Mapping[str, Any], ...]  # each sample's json, {} without one

    @property
    def pixels_01(self) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1]."""
        return self.pixels.float() / 255

    def to(self, device: torch.device) -> PixelBatch:
        """A copy with the pixels on `device`."""
        return to_device(self, device)


@dataclass(frozen=True)
class PixelConfig:
    """How image files become batches."""

    images_per_pack: int  # images in one micro-batch of one rank
    image_px: int  # side of the square the model sees
    resize_px: int | None = None  # short side before the crop, pixels; None: image_px
    crop: Literal["center", "random"] = "center"  # random: keyed by (seed, epoch, sample)

    def __post_init__(self) -> None:
        if self.images_per_pack < 1 or self.image_px < 1:
            raise ConfigError("images_per_pack and image_px must be positive")
        if self.resize_px is not None and self.resize_px < self.image_px:
            raise ConfigError(f"resize_px = {self.resize_px} is smaller than image_px = {self.image_px}")


class PixelPacker:
    """Every sample has length 1: a pack is `images_per_pack` samples in the plan's order."""

    budget_key = "pixels.images_per_pack"

    def __init__(self, config: PixelConfig) -> None:
        self.budget = config.images_per_pack
        self._config = config

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Ones, int64 [len(dataset)]. Raises UserError when the shards hold latents."""
        if dataset.manifest.latent is not None:
            raise UserError(
                f"{dataset.directory}: holds latents, not pixels; give the shards they were made from"
            )
        return np.ones(len(dataset), np.int64)

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> PixelBatch:
        """Decodes `samples`, each met in its epoch of `epochs`; `seed` is the run's.

        Raises UserError naming shard and key: no image or several, one that cannot be decoded or is too long and
        thin to be resized, bad json.
        """
        config = self._config
        pixels = []
        for sample, epoch in zip(samples, epochs, strict=True):
            corner = sample_uniforms(seed, epoch, sample.key)[:2] if config.crop == "random" else None
            parts = [part for part in sample.parts if part in IMAGE_PARTS]
            if len(parts) != 1:
                raise UserError(
                    f"{sample.where}: {len(parts)} of png, jpg, jpeg, webp; one is needed for training"
                )
            image = decode_image(sample, parts[0])
            try:
                pixels.append(fit_image(image, config.image_px, resize_px=config.resize_px, corner=corner))
            except UserError as error:
                raise UserError(f"{sample.where}: '{parts[0]}': {error}") from None
        return PixelBatch(
            pixels=torch.stack(pixels),
            sample_ids=tuple(sample.key for sample in samples),
            seed=pack_seed(seed, step, stream),
            meta=tuple(read_meta(sample) for sample in samples),
        )


def decode_image(sample: Sample, part: str) -> Image.Image:
    """RGB image of `sample.parts[part]`; transparency is laid on white.

    Raises UserError naming shard and key.
    """
    try:
        return read_rgb(io.BytesIO(sample.parts[part]))
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{sample.where}: '{part}' is no readable image ({reason}); make this shard again"
        ) from None


def read_rgb(payload: io.BytesIO) -> Image.Image:
    """RGB image of a PNG, JPEG or WebP file; transparency is laid on white. Raises ValueError: no such image."""
    return to_rgb(open_image(payload))


def open_image(payload: io.BytesIO) -> Image.Image:
    """The decoded image of a PNG, JPEG or WebP file, in its own mode; the first one of an animation.

    Raises ValueError: another format, a damaged file, more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(payload, formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} px are over the limit of {MAX_PIXELS} pixels")
        image.load()
    except UnidentifiedImageError:  # its message holds an address in memory, different in every run
        raise ValueError("not a PNG, JPEG or WebP file, or its header is damaged") from None
    except DECODE_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: transparency is laid on white, 16 bits of grey are rounded."""
    if image.mode.startswith("I"):  # convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def image_suffix(payload: bytes) -> str:
    """ "png", "jpg" or "webp", by the first bytes of a file. Raises ValueError: none of them."""
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if payload.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "webp"
    raise ValueError("neither PNG, JPEG nor WebP" if payload else "no bytes")


def part_name(role: str, suffix: str) -> str:
    """The name of an image part: "jpg", or with a role (data/layouts.py) "source.jpg", "target1.jpg"."""
    return f"{role}.{suffix}" if role else suffix


def image_parts(parts: Iterable[str]) -> list[str]:
    """The names of image parts ("jpg", "source.png"), sorted: sources come before targets, numbers ascend."""
    return sorted(part for part in parts if part.rpartition(".")[2] in IMAGE_PARTS)


def fit_image(
    image: Image.Image,
    image_px: int,
    *,
    resize_px: int | None = None,
    corner: tuple[float, float] | None = None,
) -> Tensor:
    """`fit_square` as uint8 [3, image_px, image_px]. Raises UserError: as fit_square."""
    image = fit_square(image, image_px, resize_px=resize_px, corner=corner)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def fit_square(
    image: Image.Image,
    image_px: int,
    *,
    resize_px: int | None = None,
    corner: tuple[float, float] | None = None,
) -> Image.Image:
    """A square of image_px: bicubic, short side to `resize_px` (default image_px), then a crop.

    `corner`, two numbers in [0, 1), places the crop between left and right, top and bottom; None: in the
    centre. Halving by boxes before the bicubic step, as in ADM (Dhariwal & Nichol 2021), keeps large
    photographs free of aliasing. Raises UserError: so long and thin that it would be enlarged beyond MAX_PIXELS.
    """
    short_px = image_px if resize_px is None else resize_px
    while min(image.size) >= 2 * short_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_px / min(image.size)
    size = (max(short_px, round(image.width * scale)), max(short_px, round(image.height * scale)))
    if size[0] * size[1] > max(MAX_PIXELS, image.width * image.height):
        raise UserError(
            f"{image.width}x{image.height} px would be enlarged to {size[0]}x{size[1]}, over the limit of "
            f"{MAX_PIXELS} pixels; reject such images (max_aspect) when the shards are made"
        )
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    free_x, free_y = image.width - image_px, image.height - image_px
    if corner is None:
        left, top = free_x // 2, free_y // 2
    else:
        left, top = int(corner[0] * (free_x + 1)), int(corner[1] * (free_y + 1))
    return image.crop((left, top, left + image_px, top + image_px))
