"""Samples -> packs of a token budget. The sample's key determines its caption, view and dropout.

data/samples/layouts.py defines which images and texts a sample has, and in which order.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from base.config import UserError
from data.config import PackingConfig
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.plan.plan import pack_seed, sample_uniforms
from data.samples.images import part_name
from data.samples.latents import check_has_variance, check_latent_shards, latent_seed, read_latents
from data.samples.layouts import (
    LATENT_SUFFIX,
    ImagePart,
    Layout,
    TextPart,
    image_roles,
    is_target,
    packed_lengths,
    read_layout,
)
from data.shards import LatentInfo, Sample, ShardDataset

if TYPE_CHECKING:
    from data.samples.text import TextTokenizer


class T2IPacker:
    """Packs text-to-image samples, KEY.latent and KEY.json in the shards, as [text, noisy image].

    `pads_attention`: SDPA will run, so the packing thread builds the padded buckets.
    """

    budget_key = "packing.tokens_per_pack"

    def __init__(
        self,
        config: PackingConfig,
        latent: LatentInfo,
        text_tokenizer: TextTokenizer,
        *,
        pads_attention: bool = False,
    ) -> None:
        if max(latent.shape[1:]) > config.max_side:
            raise UserError(
                f"latents of {latent.shape[1:]} do not fit packing.max_side = {config.max_side}; raise it"
            )
        if config.sample_latents:
            check_has_variance(latent)
        self.budget = config.tokens_per_pack
        self._config = config
        self._latent = latent
        self._text_tokenizer = text_tokenizer
        self._pads_attention = pads_attention

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Tokens of each sample with its longest caption and nothing dropped, int64 [len(dataset)].

        Raises UserError: shards of pixels, latents that are not this packer's, or text that another tokenizer counted.
        """
        check_latent_shards(dataset, self._latent)
        if self._latent.text_tokenizer_fingerprint != self._text_tokenizer.fingerprint:
            raise UserError(
                f"{dataset.directory}: text was counted by another text tokenizer; encode again with this run's"
            )
        return packed_lengths(dataset, self._latent, self._config.draws_per_caption)

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> PackedBatch:
        """Makes one pack of `samples`, each met in its epoch of `epochs`; `seed`: the run's seed.

        Raises UserError naming shard and key: a missing part, a wrong latent size, images of another kind of sample,
        bad splits, an empty or missing caption, or no caption of a kind that has a weight.
        """
        choices = [_Choices(seed, epoch, sample.key) for sample, epoch in zip(samples, epochs, strict=True)]
        # Dropped captions are read, too, so that a bad caption shows up in the first epoch.
        layouts = [
            self._layout(sample, choice.caption) for sample, choice in zip(samples, choices, strict=True)
        ]
        images = self._images(samples, layouts, choices)
        batch = build_packed_batch(
            [self._splits(*of_sample) for of_sample in zip(layouts, images, choices, strict=True)],
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
        if self._pads_attention:
            batch.build_buckets()
        return batch

    def _layout(self, sample: Sample, draw: float) -> Layout:
        """The sample's layout. Raises UserError: the sample is not exactly one image without a role."""
        if (roles := image_roles(sample.parts)) != [""]:
            raise UserError(
                f"{sample.where}: no text-to-image sample, it needs a part 'latent' and has the images "
                f"{', '.join(roles) or 'none'}; edits are trained by launch/train_edit.py"
            )
        return read_layout(sample, draw, self._config.caption_weights)

    def _images(
        self, samples: Sequence[Sample], layouts: Sequence[Layout], choices: Sequence[_Choices]
    ) -> list[dict[str, Tensor]]:
        """Normalised latents of each sample, role -> float32 [C, Y, X]. Reads samples with equal roles together."""
        alike: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for index, layout in enumerate(layouts):
            roles = dict.fromkeys(part.role for part in layout if isinstance(part, ImagePart))
            alike[tuple(roles)].append(index)
        images: list[dict[str, Tensor]] = [{} for _ in samples]
        is_drawn = self._config.sample_latents
        for names, indices in alike.items():
            latents = read_latents(
                [samples[index] for index in indices],
                [part_name(role, LATENT_SUFFIX) for role in names],
                self._latent,
                views=[int(choices[index].view * self._latent.num_views) for index in indices],
                seeds=[choices[index].latent_seed for index in indices] if is_drawn else None,
            )
            for index, of_sample in zip(indices, latents, strict=True):
                images[index] = dict(zip(names, of_sample, strict=True))
        return images

    def _splits(
        self, layout: Layout, images: Mapping[str, Tensor], choices: _Choices
    ) -> list[TextSplit | ImageSplit]:
        """The splits of a sample: its targets, possibly repeated, and the conditions that dropout keeps."""
        splits: list[TextSplit | ImageSplit] = []
        num_draws = choices.num_draws(layout, self._config.draws_per_caption)
        dropouts = choices.dropouts(layout)
        for number, part in enumerate(layout):
            if isinstance(part, TextPart):
                if part.loss or dropouts[number] >= self._config.text_dropout:
                    splits.append(text_split(part.text, self._text_tokenizer, loss=part.loss))
            elif part.target:
                splits += [ImageSplit(images[part.role], noisy=True)] * num_draws[number]
            elif dropouts[number] >= self._config.source_dropout:
                splits.append(ImageSplit(images[part.role], noisy=False))
        return splits


class EditPacker(T2IPacker):
    """Packs edits as [clean sources, instruction, noisy targets], and interleaved samples in their own order.

    The shards hold KEY.json and KEY.source.latent or KEY.source0.latent, ..., KEY.target.latent or KEY.target0.latent,
    ..., or KEY.image0.latent, ...; data/samples/layouts.py defines which parts a sample has.
    """

    def _layout(self, sample: Sample, draw: float) -> Layout:
        """The sample's layout. Raises UserError: an image without a role, images of no layout, or bad splits."""
        if image_roles(sample.parts) == [""]:
            raise UserError(
                f"{sample.where}: no edit, its image has no role; text-to-image is trained by launch/train_t2i.py"
            )
        return read_layout(sample, draw, self._config.caption_weights)


class _Choices:
    """The random choices about one sample in one epoch, as numbers in [0, 1)."""

    def __init__(self, seed: int, epoch: int, key: str) -> None:
        self._names = seed, epoch, key
        self.caption, self._text, self._source, self.view = sample_uniforms(seed, epoch, key)

    @property
    def latent_seed(self) -> int:
        """Seed for drawing the sample's latents."""
        return latent_seed(*self._names)

    def dropouts(self, layout: Layout) -> dict[int, float]:
        """A uniform number for each condition, by its place in `layout`; a target has none.

        The first text and the first image use the numbers of `sample_uniforms`; further conditions get their own.
        """
        own = {TextPart: self._text, ImagePart: self._source}
        draws: dict[int, float] = {}
        for number, part in enumerate(layout):
            if not is_target(part):
                draw = own.pop(type(part), None)
                draws[number] = self._further(number) if draw is None else draw
        return draws

    def num_draws(self, layout: Layout, draws_per_caption: int) -> collections.Counter[int]:
        """How often each target is drawn, by its place in `layout`: each once; extra draws round-robin."""
        targets = [number for number, part in enumerate(layout) if is_target(part)]
        start = int(self._further("targets") * len(targets))
        further = (targets[(start + draw) % len(targets)] for draw in range(draws_per_caption - 1))
        return collections.Counter([*targets, *further])

    def _further(self, name: object) -> float:
        seed, epoch, key = self._names
        return sample_uniforms(seed, epoch, f"{key}/{name}")[0]  # no key has a "/"


def text_split(text: str, text_tokenizer: TextTokenizer, *, loss: bool = False) -> TextSplit:
    """A text as [<|im_start|>, ids, <|im_end|>]; `loss`: as in TextSplit."""
    ids = [text_tokenizer.im_start_id, *text_tokenizer.encode(text), text_tokenizer.im_end_id]
    return TextSplit(ids, loss)
