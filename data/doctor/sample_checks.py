"""Examines every sample of a shard (pixels, latents, captions, labels) and sums up what it finds."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from base.config import UserError
from data.samples.captions import TEXT_FIELDS, clean_text, half_character, split_texts
from data.samples.images import IMAGE_PARTS, decode_image
from data.samples.layouts import check_roles, image_roles, is_interleaved, of_kind, read_splits
from data.shards.index import LatentInfo, Records, Sample, key_hash

MEASURED_LATENTS = 256  # samples of each shard whose latents are compared with the manifest's statistics
MAX_GROUPS = 1000  # most tasks and kinds that are counted separately
OTHERS = "others"
Vector = npt.NDArray[np.float64]
Choice = tuple[int, int, int]  # (key hash, number of the shard, position in the shard)


@dataclass
class Tally:
    """Sums over samples; `merge` adds another shard's sums."""

    num_samples: int = 0
    num_images: int = 0
    num_grey: int = 0  # images without colour
    num_unchanged: int = 0  # edits whose target equals their source in every pixel or latent bit
    num_measured: int = 0  # samples in the sums of latents
    parts: collections.Counter[str] = field(default_factory=collections.Counter)
    short_sides: collections.Counter[int] = field(default_factory=collections.Counter)  # of images, px
    long_sides: collections.Counter[int] = field(default_factory=collections.Counter)
    texts: collections.Counter[str] = field(
        default_factory=collections.Counter
    )  # "captions.llava" -> captions
    words: collections.Counter[int] = field(default_factory=collections.Counter)  # of captions
    text_tokens: collections.Counter[int] = field(default_factory=collections.Counter)  # of longest captions
    groups: collections.Counter[str] = field(default_factory=collections.Counter)  # "task: swap" -> samples
    classes: collections.Counter[tuple[int, str]] = field(default_factory=collections.Counter)  # label, name
    caption_hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    chosen: list[Choice] = field(
        default_factory=list
    )  # samples with the smallest key hashes: a fixed random choice
    latent_values: Vector = field(
        default_factory=lambda: np.zeros(1)
    )  # [C]: number of values; the next two are sums over (z - mean) / std
    latent_sums: Vector = field(default_factory=lambda: np.zeros(1))
    latent_squares: Vector = field(default_factory=lambda: np.zeros(1))

    def merge(self, other: Tally, num_chosen: int) -> None:
        """Adds the sums of `other`, and keeps `num_chosen` of the chosen samples."""
        for name in (entry.name for entry in dataclasses.fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, collections.Counter):
                for value, count in theirs.items():
                    add(mine, value, count)
            else:
                setattr(self, name, mine + theirs)
        self.chosen = sorted(self.chosen)[:num_chosen]


def add(counter: collections.Counter[Any], value: Any, count: int = 1) -> None:
    """Counts a value. Texts beyond MAX_GROUPS different ones are counted as OTHERS, so that memory is bounded."""
    if isinstance(value, str) and len(counter) >= MAX_GROUPS and value not in counter:
        value = OTHERS
    counter[value] += count


class ShardInspector:
    """Examines the samples of one shard. Implements data.shards.verification.Inspector."""

    def __init__(self, shard: int, latent: LatentInfo | None, num_chosen: int) -> None:
        self.tally = Tally()
        self._shard = shard
        self._latent = latent
        self._num_chosen = num_chosen
        self._hashes: list[int] = []
        self._stride = 1
        self._image_tokens: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def start(self, records: Records) -> None:
        """Takes the shard's index: chooses samples and counts text tokens."""
        self._stride = -(-len(records) // MEASURED_LATENTS)
        self._image_tokens = records["num_image_tokens"].astype(np.int64)
        smallest = np.argsort(records["key_hash"], kind="stable")[: self._num_chosen].tolist()
        self.tally.chosen = [
            (int(records["key_hash"][position]), self._shard, position) for position in smallest
        ]
        for num_tokens, count in zip(*np.unique(records["num_text_tokens"], return_counts=True), strict=True):
            self.tally.text_tokens[int(num_tokens)] += int(count)

    def finish(self) -> Tally:
        """Returns the sums, after the last sample."""
        self.tally.caption_hashes = [np.array(self._hashes, np.uint64)]
        return self.tally

    def look(self, position: int, sample: Sample, tree: dict[str, Any]) -> Iterator[str]:
        """Adds a sample to the sums; yields its faults as "kind: detail"."""
        self.tally.num_samples += 1
        add(self.tally.parts, " + ".join(sorted(sample.parts)))
        for name in ("task", "kind"):
            if isinstance(tree.get(name), str):
                add(self.tally.groups, f"{name}: {tree[name]}")
        splits = split_texts(tree) if is_interleaved(image_roles(sample.parts)) else None
        yield from self._look_at_text(tree, splits)
        if self._latent is None:
            yield from self._look_at_images(sample, tree)
        else:
            yield from self._look_at_latents(position, sample, tree, self._latent)

    def _look_at_text(self, tree: dict[str, Any], splits: list[Any] | None) -> Iterator[str]:
        """Examines label and texts. `splits`: the texts of an interleaved sample; None: another kind of sample."""
        label, name = tree.get("label"), tree.get("class", "")
        if "label" in tree and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
            yield f"bad label: {label!r:.80} is no number from 0"
        elif isinstance(label, int):
            self.tally.classes[label, str(name)] += 1
        texts = [(field, tree[field]) for field in TEXT_FIELDS if field in tree][:1]  # as training reads them
        texts = texts if splits is None else [("splits", splits)]
        if texts:
            texts = _flat(*texts[0])
        if not texts and label is None:
            yield f"no caption: json has no {', '.join(TEXT_FIELDS)} and no label"
        for kind, text in texts:
            if not isinstance(text, str):
                yield f"bad caption: {kind} holds {type(text).__name__}, not text"
            elif half_character(text) is not None:
                yield f"bad caption: {kind} holds half of a letter (a lone surrogate)"
            elif not clean_text(text):
                yield f"empty caption: {kind}"
            else:
                add(self.tally.texts, kind)
                self.tally.words[len(text.split())] += 1
                self._hashes.append(key_hash(text))

    def _look_at_images(self, sample: Sample, tree: dict[str, Any]) -> Iterator[str]:
        images: dict[str, Image.Image] = {}
        roles = [part.rpartition(".")[0] for part in sample.parts if part.split(".")[-1] in IMAGE_PARTS]
        if len(set(roles)) != len(roles):
            yield f"several images: {', '.join(sorted(sample.parts))}"
            return
        for part in sample.parts:
            if part.split(".")[-1] not in IMAGE_PARTS:
                continue
            try:
                image = decode_image(sample, part)
            except UserError as error:
                yield f"unreadable image: {str(error).removeprefix(f'{sample.where}: ')}"
                continue
            images[part.rpartition(".")[0]] = image
            self._measure(image)
        yield from _check_layout(image_roles(sample.parts), tree, "image")
        for source_role, target_role in _pairs(images):
            source, target = images[source_role], images[target_role]
            if source.size != target.size:
                sizes = " and ".join(f"{image.width}x{image.height} px" for image in (source, target))
                yield f"unequal sizes: {source_role} and {target_role} have {sizes}"
            else:
                self.tally.num_unchanged += source.tobytes() == target.tobytes()

    def _measure(self, image: Image.Image) -> None:
        self.tally.num_images += 1
        self.tally.short_sides[min(image.size)] += 1
        self.tally.long_sides[max(image.size)] += 1
        pixels = np.asarray(image)
        self.tally.num_grey += bool((pixels[..., :1] == pixels[..., 1:]).all())

    def _look_at_latents(
        self, position: int, sample: Sample, tree: dict[str, Any], latent: LatentInfo
    ) -> Iterator[str]:
        parts = {part.rpartition(".")[0]: part for part in sample.parts if part.split(".")[-1] == "latent"}
        yield from _check_layout(image_roles(parts.values()), tree, "latent")
        num_tokens = _num_images(parts, tree) * latent.shape[1] * latent.shape[2]
        if parts and num_tokens != self._image_tokens[position]:
            yield f"bad index: {self._image_tokens[position]} image tokens, its latents have {num_tokens}"
        is_measured = position % self._stride == 0
        self.tally.num_measured += is_measured
        for part in parts.values():
            payload = sample.parts[part]
            if len(payload) != latent.num_bytes:
                yield f"bad latent: '{part}' has {len(payload)} bytes, not {latent.num_bytes}"
                continue
            values = stored_values(payload, latent)
            if not np.isfinite(values).all():
                yield f"bad latent: '{part}' has {int((~np.isfinite(values)).sum())} values that are not finite"
            elif (values[:, 0] == values[0, 0, 0, 0, 0]).all():
                yield f"bad latent: '{part}' holds one value everywhere"
            elif is_measured:
                self._add_latents(values[:, 0], latent)
        for source, target in _pairs(parts):
            self.tally.num_unchanged += sample.parts[parts[source]] == sample.parts[parts[target]]

    def _add_latents(self, means_VCYX: npt.NDArray[np.float32], latent: LatentInfo) -> None:
        z = normalised(means_VCYX, latent)
        tally = self.tally
        tally.latent_values = tally.latent_values + np.full(len(latent.mean), z[:, 0].size)
        tally.latent_sums = tally.latent_sums + z.sum(axis=(0, 2, 3))
        tally.latent_squares = tally.latent_squares + np.square(z).sum(axis=(0, 2, 3))


def stored_values(payload: bytes, latent: LatentInfo) -> npt.NDArray[np.float32]:
    """The values of a stored latent part, float32 [num_views, M, C, Y, X]; M as in LatentInfo."""
    if latent.dtype == "bf16":
        values = (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(payload, "<f2" if latent.dtype == "fp16" else "<f4").astype(np.float32)
    return values.reshape(latent.num_views, 2 if latent.has_logvar else 1, *latent.shape)


def normalised(means: npt.NDArray[np.float32], latent: LatentInfo) -> npt.NDArray[np.float64]:
    """(z - mean) / std by channel, float64 [..., C, Y, X]."""
    mean, std = (np.array(values)[:, None, None] for values in (latent.mean, latent.std))
    return np.asarray((means - mean) / std, np.float64)


def _flat(field: str, found: Any) -> list[tuple[str, Any]]:
    """(kind, text) pairs of a text, a list of texts, or an object of kind -> text."""
    if isinstance(found, dict):
        return [(f"{field}.{name}", text) for name, text in found.items()]
    return [(field, text) for text in (found if isinstance(found, list) else [found])]


def _check_layout(roles: list[str], tree: dict[str, Any], what: str) -> Iterator[str]:
    """Yields faults of the image roles (data/samples/layouts.py) and of an interleaved sample's splits."""
    try:
        check_roles(roles)
    except ValueError as error:
        yield f"no {what}: {error}"
        return
    if is_interleaved(roles):
        try:
            read_splits(tree, roles)
        except ValueError as error:
            yield f"bad splits: {error}"


def _num_images(roles: Collection[str], tree: dict[str, Any]) -> int:
    """Number of images that the index counts: an interleaved sample's images count as often as its splits name them."""
    splits = tree.get("splits")
    if not is_interleaved(roles) or not isinstance(splits, list):
        return len(roles)
    return sum(isinstance(split, dict) and "image" in split for split in splits)


def _pairs(roles: Collection[str]) -> list[tuple[str, str]]:
    """(source, target) pairs of an edit with one source, whose images show one scene."""
    sources, targets = sorted(of_kind(roles, "source")), sorted(of_kind(roles, "target"))
    return [(source, target) for source in sources for target in targets] if len(sources) == 1 else []
