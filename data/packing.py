"""Samples -> packs of a token budget (contract 3): a caption, a view, condition dropout; all keyed by the sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data.attention_plan import AttentionPlan, PaddedBucket, VarlenGroup
from data.captions import choose_caption, read_captions
from data.latents import read_latents
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
from engine import files
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


@dataclass(frozen=True)
class PackingConfig:
    """How text-to-image and edit samples become packs."""

    tokens_per_pack: int  # budget of one pack, tokens; a micro-batch of one rank
    max_side: int = 64  # rows of the position table per axis, latent pixels; at least the latents' Y and X
    text_dropout: float = 0.1  # probability that a sample's text is left out (classifier-free guidance)
    source_dropout: float = (
        0.3  # probability that an edit's source image is left out (Bagel's fine-tune default)
    )
    # Kind of caption -> weight, for captions with names; other kinds are never taken. Empty: all are alike.
    caption_weights: dict[str, float] = field(default_factory=dict)
    sample_latents: bool = False  # draw z by its stored variance, anew each epoch; False: z is the mean

    def __post_init__(self) -> None:
        if self.tokens_per_pack < 1 or self.max_side < 1:
            raise ConfigError("tokens_per_pack and max_side must be positive")
        weights = self.caption_weights.values()
        if weights and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
            raise ConfigError(
                f"caption_weights {self.caption_weights}: give weights of at least 0, one of them above 0"
            )
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
        if config.sample_latents and not latent.has_logvar:
            raise UserError(
                "packing.sample_latents: these latents were stored without a variance; encode with logvar: true"
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

        Raises UserError naming shard and key: missing part, wrong latent size, empty or missing caption, none of a
        kind that has a weight.
        """
        met = list(zip(samples, epochs, strict=True))
        draws = [sample_uniforms(seed, epoch, sample.key) for sample, epoch in met]
        seeds: list[int] | None = None
        if self._config.sample_latents:
            seeds = [_latent_seed(seed, epoch, sample.key) for sample, epoch in met]
        latents = read_latents(
            samples,
            self.latent_parts,
            self._latent,
            views=[int(view_draw * self._latent.num_views) for *_, view_draw in draws],
            seeds=seeds,
        )
        packed: list[list[TextSplit | ImageSplit]] = []
        for sample, (which, text_draw, source_draw, _), images in zip(samples, draws, latents, strict=True):
            # Also when it is dropped: a bad one shows up in the first epoch.
            caption = choose_caption(sample, which, self._config.caption_weights)
            splits: list[TextSplit | ImageSplit] = []
            if source_draw >= self._config.source_dropout:
                splits += [ImageSplit(image, noisy=False) for image in images[:-1]]
            if text_draw >= self._config.text_dropout:
                splits.append(text_split(caption, self._text_tokenizer))
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


def _latent_seed(seed: int, epoch: int, key: str) -> int:
    """Seed of the draw of one sample's latents in one epoch, 60 bits."""
    return int(files.digest(["latent", seed, epoch, key])[:15], 16)
