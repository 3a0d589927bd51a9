"""Configs of sources and of the preparation of samples. This module needs no library that reads images or tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from base.config import UserError

Encoding = Literal["jpeg", "png", "webp"]
Fit = Literal["crop", "pad"]
Join = Literal["key", "url"]


@dataclass(frozen=True)
class PreparationConfig:
    """How samples are filtered and fitted before they are written; data/sources/prepare.py does it."""

    resolution: int | None = None
    """Side of the square to which images are fitted, pixels. Without it sizes stay."""
    min_px: int | None = None
    """Least short side of an image, pixels. Without it: --resolution, so that nothing is enlarged."""
    max_aspect: float | None = None
    """Largest allowed longer side / shorter side of an image."""
    min_words: int = 0
    """Least words of a caption. Other captions are dropped; a sample without captions left is rejected."""
    max_words: int | None = None
    """Most words of a caption."""
    min_letters: int = 0
    """Least letters of a caption, spaces included."""
    max_letters: int | None = None
    """Most letters of a caption, spaces included."""
    encoding: Encoding = "jpeg"
    """Format of changed images: JPEG 95 4:4:4, or a lossless one."""
    fit: Fit = "crop"
    """How an image becomes a square: its centre is cut out, or white is added."""

    def __post_init__(self) -> None:
        """Raises UserError: a limit that no sample passes, or an unknown encoding or fit."""
        if self.fit not in get_args(Fit):
            raise UserError(f"fit '{self.fit}': choose crop or pad")
        if self.encoding not in get_args(Encoding):
            raise UserError(f"encoding '{self.encoding}': choose one of {', '.join(get_args(Encoding))}")
        for name in ("resolution", "min_px", "max_words", "max_letters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give at least 1")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise UserError(f"max_aspect is {self.max_aspect}; it is longer side / shorter side, at least 1")
        for kind in ("words", "letters"):
            low, high = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if low < 0 or (high is not None and high < low):
                raise UserError(f"min_{kind} is {low} and max_{kind} {high}; no caption can have both")


@dataclass(frozen=True)
class ParquetConfig:
    """The role of each column of parquet files; ParquetColumns of data/sources/parquet.py checks that they fit.

    An image column holds a file's bytes, or the hub's struct with a field `bytes`.
    """

    image: str | None = None
    """Column of a single image. An edit has --source and --target instead."""
    source: str | None = None
    """Column of an edit's original image."""
    target: str | None = None
    """Column of an edit's result."""
    captions: tuple[str, ...] = ()
    """Columns of captions: text, or a list of texts. Each of several columns is a kind of caption."""
    instruction: str | None = None
    """Column of an edit's instruction: text, or a list of texts."""
    label: str | None = None
    """Column of a class number; json also gets the class's name if the hub's features have it."""
    key: str | None = None
    """Column of keys, each unique. Without it, or where it is no valid key, rows are numbered."""
    kept: tuple[str, ...] = ()
    """Further columns, stored in json under their names."""
