"""Prepares samples for training: checks images and captions, and fits images to a square."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import PIL
from PIL import Image

from base import limits
from base.config import UserError
from data.samples.captions import TEXT_FIELDS, clean_text, is_class, read_object
from data.samples.images import (
    fit_square,
    image_parts,
    image_suffix,
    open_image,
    part_name,
    to_rgb,
    turn_of,
    upright_size,
)
from data.samples.layouts import is_interleaved, of_kind
from data.shards import Sample
from data.shards.index import Cut
from data.sources.base import BadItemError
from data.sources.config import PreparationConfig

JPEG_QUALITY = 95
EQUAL_ASPECT = 0.01  # relative tolerance between the aspects of an edit's source and target
CUT_AREA = 0.2  # share of an image's area that a square crop may remove without being counted
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}

Texts = str | list[str] | dict[str, str]


@dataclass(frozen=True)
class Preparation(PreparationConfig):
    """Filters and fits every sample before it is written; the argument `prepare` of data.sources.write.write_sources.

    An image keeps its file's bytes unless pixels change: because its EXIF orientation is not upright, or because
    `resolution` requires another size.
    """

    @property
    def description(self) -> str:
        """The settings in words, a part of the shards' identity."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        told = [f"{name} {value}" for name, value in named.items() if value not in (None, 0, "crop")]
        if self.resolution is not None:  # the library decides the bytes of changed images
            told.append(f"Pillow {PIL.__version__}")
        return f"prepared: {', '.join(told)}"

    def __call__(self, sample: Sample) -> Sample:
        """The prepared sample, without the counts of `prepare`."""
        return self.prepare(sample)[0]

    def prepare(self, sample: Sample) -> tuple[Sample, Cut]:
        """The prepared sample, and the counts of its cropped images.

        If an image is resized, json gets "width" and "height" of the original (of the last one: an edit's target).
        Raises BadItemError, with these kinds: no image, unclear images, bad json, caption length, unreadable image, too
        small, aspect, sizes differ.
        """
        meta = _read_meta(sample)
        images = {part: _open(sample, part) for part in _one_of_each_role(sample)}
        sizes = {part: upright_size(image) for part, image in images.items()}
        fitted = self._kept_captions(sample.key, meta)
        for part, size in sizes.items():
            self._check_size(sample.key, part, size)
        _check_aspects(sample.key, {part.rpartition(".")[0]: size for part, size in sizes.items()})
        prepared = {part: payload for part, payload in sample.parts.items() if part not in images}
        for part, image in images.items():
            suffix, payload = image_suffix(sample.parts[part]), sample.parts[part]
            if turn_of(image) is not None or not self._fits(sizes[part]):
                suffix, payload = SUFFIXES[self.encoding], self._encode(sample.key, part, image)
            prepared[part_name(part.rpartition(".")[0], suffix)] = payload
        if not all(map(self._fits, sizes.values())):
            width, height = list(sizes.values())[-1]
            fitted |= {"width": width, "height": height}
        if fitted != meta:
            prepared["json"] = json.dumps(fitted, sort_keys=True).encode()
        return replace(sample, parts=prepared), self._cut(list(sizes.values()))

    def _cut(self, sizes: Sequence[tuple[int, int]]) -> Cut:
        if self.resolution is None or self.fit == "pad":
            return Cut()
        return Cut(len(sizes), sum(1 - min(size) / max(size) > CUT_AREA for size in sizes))

    def _fits(self, size: tuple[int, int]) -> bool:
        return self.resolution is None or size == (self.resolution, self.resolution)

    def _kept_captions(self, key: str, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The json with the captions of allowed length. Raises BadItemError: no caption has one."""
        texts = {name: meta[name] for name in TEXT_FIELDS if name in meta}
        kept = {name: select_texts(value, self._has_good_length) for name, value in texts.items()}
        if texts and not any(kept.values()) and not is_class(meta):
            raise BadItemError(key, f"caption length: {json.dumps(texts)[:200]}")
        others = {name: value for name, value in meta.items() if name not in TEXT_FIELDS}
        return {**others, **{name: value for name, value in kept.items() if value is not None}}

    def _has_good_length(self, text: str) -> bool:
        num_words = len(text.split())
        return (
            self.min_words <= num_words
            and self.min_letters <= len(text)
            and (self.max_words is None or num_words <= self.max_words)
            and (self.max_letters is None or len(text) <= self.max_letters)
        )

    def _check_size(self, key: str, part: str, size: tuple[int, int]) -> None:
        short_px, long_px = sorted(size)
        shape = f"'{part}' has {size[0]}x{size[1]} px"
        min_px = self.min_px or self.resolution
        if self.min_px is None and self.fit == "pad":  # padding enlarges nothing if the longer side suffices
            if min_px is not None and long_px < min_px:
                raise BadItemError(key, f"too small: {shape}, the longer side must have {min_px}")
        elif min_px is not None and short_px < min_px:
            raise BadItemError(key, f"too small: {shape}, the shorter side must have {min_px}")
        if self.max_aspect is not None and long_px > self.max_aspect * short_px:
            raise BadItemError(key, f"aspect: {shape}, sides may differ by a factor of {self.max_aspect:g}")

    def _encode(self, key: str, part: str, image: Image.Image) -> bytes:
        """Encodes upright RGB pixels, fitted, without EXIF data and colour profile, which training ignores, too."""
        image = to_rgb(image)
        if self.resolution is not None:
            try:
                image = fit_square(image, self.resolution, pad=self.fit == "pad")
            except UserError as error:
                raise BadItemError(key, f"aspect: '{part}': {error}") from None
        image.info.clear()
        buffer = io.BytesIO()
        if self.encoding == "jpeg":
            image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        elif self.encoding == "png":
            image.save(buffer, "PNG")
        else:
            image.save(buffer, "WEBP", lossless=True)
        return buffer.getvalue()


def select_texts(value: object, keep: Callable[[str], bool] = bool) -> Texts | None:
    """The cleaned texts of a caption field (a text, a list, or kind -> text) that `keep` accepts; None: no text.

    Drops empty texts, texts with zero bytes, and texts beyond limits.CAPTION_BYTES.
    """
    if isinstance(value, list):
        return [text for item in value if (text := _select_text(item, keep))] or None
    if isinstance(value, Mapping):
        return {kind: text for kind, item in value.items() if (text := _select_text(item, keep))} or None
    return _select_text(value, keep)


def clean_splits(splits: object) -> object:
    """json's "splits" with texts cleaned by `select_texts`; a bad text becomes "", which readers of splits refuse."""
    if not isinstance(splits, list):
        return splits
    return [
        {**split, "text": select_texts(split["text"]) or ""}
        if isinstance(split, Mapping) and "text" in split
        else split
        for split in splits
    ]


def _select_text(value: object, keep: Callable[[str], bool]) -> str | None:
    if not isinstance(value, str) or len(value) > limits.CAPTION_BYTES:
        return None
    text = clean_text(value)
    return text if text and "\0" not in text and keep(text) else None


def _read_meta(sample: Sample) -> dict[str, Any]:
    try:
        return read_object(sample.parts.get("json", b"{}"))
    except ValueError as error:
        raise BadItemError(sample.key, f"bad json: {error}") from None


def _one_of_each_role(sample: Sample) -> list[str]:
    """The image parts, sorted, so that sources come before targets. Raises BadItemError: none, or several of a role."""
    parts = image_parts(sample.parts)
    if not parts:
        raise BadItemError(sample.key, f"no image: the parts are {', '.join(sorted(sample.parts))}")
    if len({part.rpartition(".")[0] for part in parts}) < len(parts):
        raise BadItemError(sample.key, f"unclear images: {', '.join(parts)} are several of one role")
    return parts


def _open(sample: Sample, part: str) -> Image.Image:
    try:
        return open_image(io.BytesIO(sample.parts[part]))
    except ValueError as error:
        raise BadItemError(sample.key, f"unreadable image: '{part}': {error}") from None


def _check_aspects(key: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that source and target of an edit have equal aspects, so that square crops show the same region.

    `sizes`: (width, height) by role. Several sources, and interleaved images, may differ. Raises BadItemError.
    """
    if is_interleaved(sizes) or len(of_kind(sizes, "source")) > 1:
        return
    aspects = [width / height for width, height in sizes.values()]
    if max(aspects) > min(aspects) * (1 + EQUAL_ASPECT):
        told = " and ".join(f"{width}x{height}" for width, height in sizes.values())
        raise BadItemError(key, f"sizes differ: {told} px")
