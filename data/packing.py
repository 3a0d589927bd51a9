"""Samples -> packs of a token budget (contract 3): captions, condition dropout, normalised latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.attention_plan import AttentionPlan, PaddedBucket, VarlenGroup
from data.packed_batch import (
    IMAGE_SPECIAL_TOKENS,
    TEXT_SPECIAL_TOKENS,
    ImageSplit,
    PackedBatch,
    TextSplit,
    build_packed_batch,
)
from data.plan import pack_seed, sample_uniforms
from data.shards import LatentInfo, Sample, ShardDataset
from engine.config import ConfigError, UserError

if TYPE_CHECKING:
    from data.text import TextTokenizer

__all__ = [
    "AttentionPlan",
    "EditPacker",
    "ImageSplit",
    "PackedBatch",
    "PackingConfig",
    "PaddedBucket",
    "T2IPacker",
    "TextSplit",
    "VarlenGroup",
    "build_packed_batch",
    "read_captions",
    "read_latents",
    "text_split",
]

TEXT_FIELDS = ("caption", "captions", "instruction", "instructions")
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PackingConfig:
    """How text-to-image and edit samples become packs."""

    tokens_per_pack: int  # budget of one pack, tokens; a micro-batch of one rank
    max_side: int = 64  # rows of the position table per axis, latent pixels; at least the latents' Y and X
    text_dropout: float = 0.1  # probability that a sample's text is left out (classifier-free guidance)
    source_dropout: float = (
        0.3  # probability that an edit's source image is left out (Bagel's fine-tune default)
    )

    def __post_init__(self) -> None:
        if self.tokens_per_pack < 1 or self.max_side < 1:
            raise ConfigError("tokens_per_pack and max_side must be positive")
        for name in ("text_dropout", "source_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")


class T2IPacker:
    """Text-to-image samples as [text, noisy image]. Shards with KEY.latent and KEY.json."""

    latent_parts: tuple[str, ...] = ("latent",)  # the last one is the target, those before it are clean

    def __init__(self, config: PackingConfig, latent: LatentInfo, text_tokenizer: TextTokenizer) -> None:
        if max(latent.shape[1:]) > config.max_side:
            raise UserError(
                f"latents of {latent.shape[1:]} do not fit packing.max_side = {config.max_side}; raise it"
            )
        self.budget = config.tokens_per_pack
        self._config = config
        self._latent = latent
        self._text_tokenizer = text_tokenizer

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Tokens of each sample, int64 [len(dataset)], with its longest caption and nothing dropped.

        Raises UserError: shards of pixels, other latents than this packer's, text counted by another
        tokenizer.
        """
        latent, where = dataset.manifest.latent, dataset.directory
        if latent is None:
            raise UserError(f"{where}: holds pixels, not latents; run launch/encode_latents.py on it")
        if latent != self._latent:
            raise UserError(
                f"{where}: latents differ from this run's (tokenizer, shape or statistics); encode again"
            )
        if latent.text_tokenizer_fingerprint != self._text_tokenizer.fingerprint:
            raise UserError(
                f"{where}: text was counted by another text tokenizer; encode again with this run's"
            )
        special = TEXT_SPECIAL_TOKENS + IMAGE_SPECIAL_TOKENS * len(self.latent_parts)
        return dataset.num_text_tokens + dataset.num_image_tokens + special

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> PackedBatch:
        """Packs `samples`, each met in its epoch of `epochs`; `seed` is the run's.

        Raises UserError naming shard and key: missing part, wrong latent size, empty or missing caption.
        """
        latents = read_latents(samples, self.latent_parts, self._latent)
        packed: list[list[TextSplit | ImageSplit]] = []
        for sample, epoch, images in zip(samples, epochs, latents, strict=True):
            which, text_draw, source_draw, _ = sample_uniforms(seed, epoch, sample.key)
            captions = read_captions(sample)  # also when it is dropped: a bad one shows up in the first epoch
            splits: list[TextSplit | ImageSplit] = []
            if source_draw >= self._config.source_dropout:
                splits += [ImageSplit(image, noisy=False) for image in images[:-1]]
            if text_draw >= self._config.text_dropout:
                splits.append(text_split(captions[int(which * len(captions))], self._text_tokenizer))
            packed.append([*splits, ImageSplit(images[-1], noisy=True)])
        batch = build_packed_batch(
            packed,
            vision_start_id=self._text_tokenizer.vision_start_id,
            vision_end_id=self._text_tokenizer.vision_end_id,
            max_side=self._config.max_side,
            seed=pack_seed(seed, step, stream),
            sample_ids=[sample.key for sample in samples],
        )
        if batch.attention.num_tokens > self.budget:
            raise UserError(
                f"{samples[0].where} and those packed with it: {batch.attention.num_tokens} tokens, more "
                f"than their index says (budget {self.budget}); encode these shards again"
            )
        return batch


class EditPacker(T2IPacker):
    """Edit samples as [clean source, instruction, noisy target].

    KEY.source.latent, KEY.target.latent, KEY.json.
    """

    latent_parts = ("source.latent", "target.latent")


def text_split(text: str, text_tokenizer: TextTokenizer) -> TextSplit:
    """[<|im_start|>, ids, <|im_end|>]"""
    return TextSplit([text_tokenizer.im_start_id, *text_tokenizer.encode(text), text_tokenizer.im_end_id])


def read_captions(sample: Sample) -> list[str]:
    """The captions or instructions in the sample's json.

    Raises UserError: no json, no text, an empty text.
    """
    try:
        tree = json.loads(sample.parts["json"])
        found = next(tree[name] for name in TEXT_FIELDS if name in tree)
    except (KeyError, ValueError, TypeError, StopIteration):
        raise UserError(
            f"{sample.where}: no json with one of {', '.join(TEXT_FIELDS)}; make the shards again"
        ) from None
    captions = [found] if isinstance(found, str) else found
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise UserError(f"{sample.where}: has an empty caption; reject such samples when the shards are made")
    return list(captions)


def read_latents(samples: Sequence[Sample], parts: Sequence[str], latent: LatentInfo) -> Tensor:
    """Normalised latents, (z - mean) / std, as float32 [len(samples), len(parts), C, Y, X].

    Raises UserError naming the sample: a missing part, a part of another size.
    """
    for sample in samples:
        for part in parts:
            if len(sample.parts.get(part, b"")) != latent.num_bytes:
                raise UserError(
                    f"{sample.where}: no part '{part}' of {latent.num_bytes} bytes; encode these shards again"
                )
    stored = bytearray().join(sample.parts[part] for sample in samples for part in parts)
    z = (
        torch.frombuffer(stored, dtype=TORCH_DTYPES[latent.dtype])
        .float()
        .view(len(samples), len(parts), *latent.shape)
    )
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (latent.mean, latent.std))
    return (z - mean) / std
