"""The layout of a sample: its images, named by roles, and its texts, in the order in which training packs them.

A role is part of an image's name, KEY.<role>.jpg, and remains when the image is encoded, KEY.<role>.latent:

    text-to-image  jpg                     [caption, target]; the single image has no role
    edit           source.jpg target.jpg   [source, instruction, target]; several of a kind are numbered from 0,
                                           source0.jpg source1.jpg ... target0.jpg target1.jpg ...:
                                           [source0, source1, ..., instruction, target0, target1, ...]
    interleaved    image0.jpg image1.jpg   json's "splits", any list with a text, a target and every image:
                                           [{"text": "a cup"}, {"image": "image0", "target": true},
                                            {"image": "image0"}, {"text": "fill it", "loss": true},
                                            {"image": "image1", "target": true}]

A target is noisy and no later split sees it, so several targets of an edit are alternative results of it. An image that
is first generated and then seen stands in "splits" twice, the second time without "target". "loss" marks a text that
the model learns to write. json is a part, too, so a sample has at most 7 images.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.packs.packed_batch import IMAGE_SPECIAL_TOKENS, TEXT_SPECIAL_TOKENS
from data.samples.captions import choose_caption, read_meta
from data.samples.images import IMAGE_PARTS
from data.samples.text import TextTokenizer
from data.shards import LatentInfo, Sample, ShardDataset
from data.shards.index import MAX_PARTS

LATENT_SUFFIX = "latent"
MAX_IMAGES = MAX_PARTS - 1
ROLE_PATTERN = re.compile(r"|source[0-9]*|target[0-9]*|image[0-9]+")


@dataclass(frozen=True)
class TextPart:
    """A text of a sample."""

    text: str
    loss: bool = False  # learned as an output


@dataclass(frozen=True)
class ImagePart:
    """An image of a sample."""

    role: str  # "" for a sample's single image
    target: bool  # generated from noise; else a condition


Layout = list[TextPart | ImagePart]


def is_target(part: TextPart | ImagePart) -> bool:
    """Whether the part is an image to be generated."""
    return isinstance(part, ImagePart) and part.target


def image_roles(parts: Iterable[str]) -> list[str]:
    """Sorted roles of the latent parts, or without latents, of the image parts. Names that are no roles are ignored."""
    named = [(role, suffix) for role, _, suffix in (part.rpartition(".") for part in parts)]
    suffixes = (LATENT_SUFFIX,) if any(suffix == LATENT_SUFFIX for _, suffix in named) else IMAGE_PARTS
    return sorted(role for role, suffix in named if suffix in suffixes and ROLE_PATTERN.fullmatch(role))


def of_kind(roles: Iterable[str], kind: str) -> list[str]:
    """The roles of one kind ("source", "target" or "image"), with or without a number."""
    return [role for role in roles if role.rstrip("0123456789") == kind]


def is_interleaved(roles: Iterable[str]) -> bool:
    """Whether images with these roles belong to an interleaved sample, whose order json's "splits" gives."""
    return bool(of_kind(roles, "image"))


def check_roles(roles: Sequence[str]) -> None:
    """Raises ValueError: the sorted roles fit none of the layouts above, or are too many."""
    held = ", ".join(role or "one without a role" for role in roles) or "none"
    if len(roles) > MAX_IMAGES:
        raise ValueError(f"{len(roles)} images, a sample holds at most {MAX_IMAGES}")
    if is_interleaved(roles):
        if list(roles) != number_roles("image", len(roles)):
            raise ValueError(f"expected image0, image1, ... without a gap and nothing else; found {held}")
        return
    sources, targets = of_kind(roles, "source"), of_kind(roles, "target")
    is_edit = all(
        named in ([kind], number_roles(kind, len(named)))
        for kind, named in (("source", sources), ("target", targets))
    )
    if list(roles) != [""] and not (is_edit and sources and targets and len(sources + targets) == len(roles)):
        raise ValueError(f"expected one, or source and target; found {held}")


def number_roles(kind: str, count: int) -> list[str]:
    """The roles kind0, kind1, ... of `count` images."""
    return [f"{kind}{number}" for number in range(count)]


def read_splits(tree: Mapping[str, Any], roles: Collection[str]) -> Layout:
    """The layout in json's "splits" of an interleaved sample that has images of `roles`.

    Raises ValueError: no such list, a split that is neither a text nor an image, no text, no target, or images that are
    missing or unused.
    """
    splits = tree.get("splits")
    if not isinstance(splits, list):
        raise ValueError('json has no list "splits"')
    layout = [_read_split(number, split, roles) for number, split in enumerate(splits)]
    named = {part.role for part in layout if isinstance(part, ImagePart)}
    if left := sorted(set(roles) - named):
        raise ValueError(f'"splits" leaves out {", ".join(left)}')
    if not any(isinstance(part, TextPart) for part in layout):
        raise ValueError('"splits" has no text')
    if not any(map(is_target, layout)):
        raise ValueError('"splits" has no image with "target": true')
    return layout


def _read_split(number: int, split: object, roles: Collection[str]) -> TextPart | ImagePart:
    if isinstance(split, Mapping):
        text, loss = split.get("text"), split.get("loss", False)
        is_text = isinstance(text, str) and bool(text.strip()) and isinstance(loss, bool)
        if is_text and split.keys() <= {"text", "loss"}:
            return TextPart(str(text), loss)
        role, target = split.get("image"), split.get("target", False)
        is_image = isinstance(role, str) and role in roles and isinstance(target, bool)
        if is_image and split.keys() <= {"image", "target"}:
            return ImagePart(str(role), target)
    raise ValueError(
        f'"splits" entry {number} is neither {{"text": not empty, "loss": true or false}} nor {{"image": one of '
        f'{", ".join(sorted(roles))}, "target": true or false}}'
    )


def read_layout(sample: Sample, draw: float = 0.0, weights: Mapping[str, float] | None = None) -> Layout:
    """The layout that training packs, of a sample of pixels or latents; `choose_caption` takes one of several captions.

    Raises UserError naming the sample: images of no layout, bad "splits", or no caption.
    """
    roles = image_roles(sample.parts)
    tree = read_meta(sample) if is_interleaved(roles) else {}
    try:
        check_roles(roles)
        if is_interleaved(roles):
            return read_splits(tree, roles)
    except ValueError as error:
        raise UserError(f"{sample.where}: {error}; make this shard again") from None
    caption = TextPart(choose_caption(sample, draw, weights or {}))
    if roles == [""]:
        return [caption, ImagePart("", target=True)]
    sources = [ImagePart(role, target=False) for role in of_kind(roles, "source")]
    return [*sources, caption, *(ImagePart(role, target=True) for role in of_kind(roles, "target"))]


def num_split_tokens(layout: Layout, tokens_per_image: int, text_tokenizer: TextTokenizer) -> tuple[int, int]:
    """An interleaved sample's counts for the index: tokens of its images and of its texts.

    An image counts as often as it stands in the layout. The texts' count includes the special tokens of all but one
    text.
    """
    texts = [len(text_tokenizer.encode(part.text)) for part in layout if isinstance(part, TextPart)]
    num_images = len(layout) - len(texts)
    return tokens_per_image * num_images, sum(texts) + TEXT_SPECIAL_TOKENS * (len(texts) - 1)


def packed_lengths(
    dataset: ShardDataset, latent: LatentInfo, draws_per_caption: int
) -> npt.NDArray[np.int64]:
    """Tokens of each sample in a pack with its longest caption and no dropout, int64 [len(dataset)].

    `draws_per_caption`: a sample has that number less one of noisy images beside its targets.
    """
    tokens_per_image = latent.shape[1] * latent.shape[2]
    num_images = -(-dataset.num_image_tokens // tokens_per_image) + draws_per_caption - 1
    num_tokens = (
        dataset.num_text_tokens + TEXT_SPECIAL_TOKENS + num_images * (tokens_per_image + IMAGE_SPECIAL_TOKENS)
    )
    return np.asarray(num_tokens, np.int64)
