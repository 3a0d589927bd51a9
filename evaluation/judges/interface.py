"""The interface of every judge that reads images and answers in words, and how a suite asks a judge.

Shapes: H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base import files
from base.config import ConfigError
from data.image_set import ImageSet, Item
from evaluation.store import Question, config_hash


@dataclass(frozen=True)
class Decoding:
    """How a judge's answer is drawn. Defaults: EditScore's."""

    temperature: float = 0.7
    """Temperature of the drawing; 0: always the most probable token."""
    top_p: float = 0.9
    """Tokens beyond this cumulative probability are left out."""
    top_k: int = 20
    """Tokens beyond this rank are left out."""
    max_new_tokens: int = 512
    """Length limit; an answer is cut off there."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 1 or self.max_new_tokens < 1:
            raise ConfigError(f"{self}: temperature >= 0, 0 < top_p <= 1, top_k and max_new_tokens >= 1")


EDITSCORE = Decoding()
YES_NO = Decoding(temperature=0.0, max_new_tokens=8)


class VisionLanguageJudge(Protocol):
    """Answers questions about images. Raises evaluation.store.RefusedError for a question that it refuses."""

    @property
    def name(self) -> str:
        """Letters, digits and _. The name is part of every metric's name, because another judge gives other numbers."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides an answer except the question and the seed."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The choices that decide the answers, in words, as JSON values."""

    def __call__(self, images: Sequence[Tensor], text: str, seed: int, text_first: bool = False) -> str:
        """Images, uint8 [3, H, W] each, of any sizes, stand before the text (or after it). Returns the answer."""


@dataclass(frozen=True)
class Asked:
    """One question about an item, without its images."""

    about: str
    """Name of the question among those about this item in this pass."""
    roles: tuple[str, ...]
    """Roles of the images to show, in order."""
    text: str
    seed: int
    number: int = 0
    """Number of the pass, from 0."""
    text_first: bool = False
    like: str | None = None
    """Role whose image's size all images take; None: each image keeps its own."""


def question(judge: VisionLanguageJudge, images: ImageSet, item: Item, asked: Asked) -> Question:
    """The question for the store. The hash in its key covers judge, words, seed and the bytes of the images."""
    read = asked.roles if asked.like is None else (*asked.roles, asked.like)
    hashes = [files.sha256(images.path(item, role)) for role in read]
    config = config_hash(judge.fingerprint, asked.text, asked.seed, asked.text_first, asked.like, hashes)

    def ask() -> str:
        pictures = [images.read(item, role) for role in asked.roles]
        if asked.like is not None:
            _, height, width = images.read(item, asked.like).shape
            pictures = [resized(picture, (height, width)) for picture in pictures]
        return judge(pictures, asked.text, asked.seed, asked.text_first)

    return Question(f"{item.key}/{asked.about}", asked.number, config, ask)


def metric_name(model: str) -> str:
    """`Qwen/Qwen3-VL-8B-Instruct` -> `qwen3_vl_8b_instruct`."""
    return re.sub(r"[^a-z0-9]+", "_", model.rstrip("/").rpartition("/")[2].lower()).strip("_")


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] -> [3, *size] by Pillow's bicubic; unchanged if it has that size."""
    if tuple(image.shape[1:]) == size:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size[1], size[0]))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
