"""Image files -> pixels: decoding, resizing, cropping, and batches of pixels for the tokenizer.

Shapes: B images, H = W = image_px.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from base import limits
from base.config import UserError
from data.config import PixelConfig
from data.packs.transfer import to_device
from data.plan.plan import pack_seed, sample_uniforms
from data.samples.captions import read_meta
from data.shards import Sample, ShardDataset

IMAGE_PARTS = ("png", "jpg", "jpeg", "webp")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
)  # Pillow's names; its many other formats bring more ways to fail
MAX_PIXELS = 1 << 26  # of a decoded and of a resized image: 8192 x 8192
TURNS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = tuple(TURNS[orientation] for orientation in (5, 6, 7, 8))  # swap width and height
TRANSPARENT_SCALES = {
    "L;2": 85,
    "L;4": 17,
    "RGB;16B": 1 / 256,
}  # a PNG's transparent colour -> Pillow's 8 bits
# Pillow's errors for damaged files.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
NOTE_ERRORS = (
    *DECODE_ERRORS,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RecursionError,
)


@dataclass(frozen=True)
class PixelBatch:
    """Images of one micro-batch."""

    pixels: Tensor  # uint8 [B, 3, H, W]
    sample_ids: tuple[str, ...]
    seed: int  # 63 bits, from (run seed, global step, stream)
    meta: tuple[Mapping[str, Any], ...]  # each sample's json, {} without one

    @property
    def pixels_01(self) -> Tensor:
        """The pixels as float32 [B, 3, H, W] in [0, 1]."""
        return self.pixels.float() / 255

    def to(self, device: torch.device) -> PixelBatch:
        """A copy with the pixels on `device`."""
        return to_device(self, device)


class PixelPacker:
    """Packs image files. Every sample has length 1, so a pack is `images_per_pack` samples in the plan's order."""

    budget_key = "pixels.images_per_pack"

    def __init__(self, config: PixelConfig) -> None:
        self.budget = config.images_per_pack
        self._config = config

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Ones, int64 [len(dataset)]. Raises UserError: the shards hold latents."""
        if dataset.manifest.latent is not None:
            raise UserError(
                f"{dataset.directory}: holds latents, not pixels; give the shards they were made from"
            )
        return np.ones(len(dataset), np.int64)

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> PixelBatch:
        """Makes one batch of `samples`, each met in its epoch of `epochs`; `seed`: the run's seed.

        Raises UserError naming shard and key: no image or several, an image that cannot be decoded or is too long and
        thin to be resized, or bad json.
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
    """The image in `sample.parts[part]`, as `to_rgb` gives it.

    Raises UserError naming shard and key: the part cannot be decoded.
    """
    try:
        return read_rgb(io.BytesIO(sample.parts[part]))
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{sample.where}: '{part}' is no readable image ({reason}); make this shard again"
        ) from None


def read_rgb(payload: io.BytesIO) -> Image.Image:
    """The image of a PNG, JPEG or WebP file, as `to_rgb` gives it. Raises ValueError: as open_image."""
    return to_rgb(open_image(payload))


def read_rgb_file(path: str | Path) -> Image.Image:
    """The image of the file at `path`, as `to_rgb` gives it. Raises UserError naming it: no such file or image."""
    try:
        return to_rgb(open_image_file(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: no readable image ({reason})") from None


def open_image_file(path: str | Path) -> Image.Image:
    """Opens the image file at `path`. Raises OSError: as base.limits.read_bytes; ValueError: as open_image."""
    return open_image(io.BytesIO(limits.read_bytes(path, limits.IMAGE_BYTES)))


def open_image(payload: io.BytesIO) -> Image.Image:
    """The decoded image of a PNG, JPEG or WebP file, in its own mode; an animation's first image.

    This is the project's only call of Image.open. Raises ValueError: another format, a damaged file, or more than
    MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(payload, formats=IMAGE_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} px are over the limit of {MAX_PIXELS} pixels")
        layouts = [tile[3] for tile in getattr(image, "tile", ())]
        image.load()
        _scale_transparent(image, layouts[0] if layouts else None)
    except UnidentifiedImageError:  # its message holds a memory address, which differs between runs
        raise ValueError("not a PNG, JPEG or WebP file, or its header is damaged") from None
    except DECODE_ERRORS as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image in any of Pillow's modes to upright 8-bit RGB. Every picture is read this way.

    Applies the EXIF orientation, lays transparency on white and rounds 16-bit grey to 8 bits; floats range from 0 to
    255. Raises ValueError: Pillow cannot convert the mode to RGB (LAB).
    """
    turn = turn_of(image)
    if image.mode[0] in "IF":  # convert() would clip 16 bits at 255
        image = _grey_8_bits(image)
    if image.has_transparency_data:
        layers = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the image upright, from its EXIF orientation; None: it is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except NOTE_ERRORS:
        return None  # damaged EXIF data in a sound image
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of `to_rgb(image)`."""
    return image.size[::-1] if turn_of(image) in QUARTER_TURNS else image.size


def _scale_transparent(image: Image.Image, layout: object) -> None:
    """Scales a PNG's transparent colour to 8 bits. Pillow scales the pixels, by their `layout` in the file, only."""
    scale = TRANSPARENT_SCALES.get(layout) if isinstance(layout, str) else None
    found = image.info.get("transparency")
    if scale is not None and isinstance(found, int):
        image.info["transparency"] = int(found * scale)
    elif scale is not None and isinstance(found, tuple):
        image.info["transparency"] = tuple(int(value * scale) for value in found)


def _grey_8_bits(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit (I;16, I;16B, ..., I) or floating-point (F) grey; applies a PNG's transparent value."""
    values = np.asarray(image)
    scale = 1 if image.mode == "F" else 257
    grey = np.clip(np.rint(np.nan_to_num(values) / scale), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    return Image.fromarray(
        np.stack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)], axis=-1)
    )


def image_suffix(payload: bytes) -> str:
    """The suffix "png", "jpg" or "webp", from a file's first bytes. Raises ValueError: another format."""
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if payload.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "webp"
    raise ValueError("neither PNG, JPEG nor WebP" if payload else "no bytes")


def part_name(role: str, suffix: str) -> str:
    """Name of an image part: "jpg", or with a role (data/samples/layouts.py) "source.jpg" or "target1.jpg"."""
    return f"{role}.{suffix}" if role else suffix


def image_parts(parts: Iterable[str]) -> list[str]:
    """The names of image parts ("jpg", "source.png") among `parts`, sorted: sources before targets, by number."""
    return sorted(part for part in parts if part.rpartition(".")[2] in IMAGE_PARTS)


def fit_image(
    image: Image.Image,
    image_px: int,
    *,
    resize_px: int | None = None,
    corner: tuple[float, float] | None = None,
) -> Tensor:
    """The result of `fit_square` as uint8 [3, image_px, image_px]. Raises UserError: as fit_square."""
    image = fit_square(image, image_px, resize_px=resize_px, corner=corner)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def fit_square(
    image: Image.Image,
    image_px: int,
    *,
    resize_px: int | None = None,
    corner: tuple[float, float] | None = None,
    pad: bool = False,
) -> Image.Image:
    """A square of `image_px`: resizes the short side to `resize_px` (None: image_px), bicubic, then crops.

    With `pad` the long side becomes `image_px` and white fills the square, so that nothing is cut away.

    `corner`, two numbers in [0, 1), places the crop between left and right, top and bottom; None: centre. Box filters
    halve large images before the bicubic step, as in ADM (Dhariwal & Nichol 2021), against aliasing. Raises UserError:
    the image is so long and thin that resizing would enlarge it beyond MAX_PIXELS.
    """
    if pad:
        return _pad_square(image, image_px)
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


def _pad_square(image: Image.Image, image_px: int) -> Image.Image:
    while max(image.size) >= 2 * image_px:
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
    scale = image_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (image_px, image_px), "white")
    square.paste(image, ((image_px - size[0]) // 2, (image_px - size[1]) // 2))
    return square
