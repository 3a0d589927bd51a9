"""Splits -> one packed batch (docs/architecture.md, section 3), which stores the tokens of each expert together.

Shapes: Tu understanding tokens (text and special tokens), Tg generation (latent) tokens, C latent channels,
I images, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from base.config import UserError
from data.packs.attention_plan import AttentionPlan, Split, build_attention_plan
from data.packs.transfer import to_device

TEXT_SPECIAL_TOKENS = 2  # <|im_start|>, <|im_end|>
IMAGE_SPECIAL_TOKENS = 2  # <|vision_start|>, <|vision_end|>


@dataclass(frozen=True)
class TextSplit:
    """Text that attends causally."""

    ids: Sequence[int]  # <|im_start|> and <|im_end|> included
    loss: bool = False  # whether every id after the first is predicted from those before it


@dataclass(frozen=True)
class ImageSplit:
    """A latent image that attends fully. A noisy image is a target, which no later split sees."""

    latents: Tensor  # float32 [C, Y, X], clean, normalised
    noisy: bool


@dataclass(frozen=True)
class PackedBatch:
    """One pack. Rows 0 .. Tu - 1 are the understanding expert's tokens, Tu .. Tu + Tg - 1 the generation expert's.

    Clean images are numbered first, then noisy images, each in the order of the samples. So the noisy images' latents,
    which are trained, are the last `num_loss_tokens` rows. All latents are stored clean: the objective draws timesteps
    and noise from `seed` and replaces the latents of noisy images.
    """

    text_ids: Tensor  # int64 [Tu]: all text splits, then every image's <|vision_start|>, <|vision_end|>
    latents: Tensor  # float32 [Tg, C], normalised, image after image, row-major over (y, x)
    rope_positions: Tensor  # int64 [Tu + Tg]
    grid_positions: Tensor  # int64 [Tg], y * max_side + x
    image_index: Tensor  # int64 [Tg], in [0, I)
    image_noisy: Tensor  # bool [I]
    text_loss_rows: Tensor  # int64 [Tl]: text rows whose successor is predicted
    text_loss_ids: Tensor  # int64 [Tl]: the successors' ids
    attention: AttentionPlan
    noisy_attention: AttentionPlan  # noisy latents, numbered from 0; each attends inside its image
    seed: int  # 63 bits, from (run seed, global step, stream)
    sample_ids: tuple[str, ...]
    num_loss_tokens: int  # tokens of noisy images
    num_targets: int  # number of noisy images

    def to(self, device: torch.device) -> PackedBatch:
        """A copy with every tensor on `device`."""
        return to_device(self, device)

    def build_buckets(self) -> None:
        """Builds the padded buckets of all plans now, on this thread, before SDPA needs them."""
        for plan in (self.attention, self.attention.outputs, self.noisy_attention):
            if plan is not None:
                plan.build_buckets()


def build_packed_batch(
    samples: Sequence[Sequence[TextSplit | ImageSplit]],
    *,
    vision_start_id: int,
    vision_end_id: int,
    max_side: int,
    seed: int,
    sample_ids: Sequence[str],
) -> PackedBatch:
    """Packs samples, each a list of splits, in Bagel's layout. The pack must hold at least one image.

    RoPE positions: every text token takes the next position, and all tokens of an image split share one position. The
    split after a clean image starts one position further; the split after a noisy image starts at the image's position.
    Raises UserError: a latent is larger than `max_side`.
    """
    splits = [split for sample in samples for split in sample]
    texts = [split for split in splits if isinstance(split, TextSplit)]
    met = [split for split in splits if isinstance(split, ImageSplit)]
    order = sorted(range(len(met)), key=lambda i: met[i].noisy)  # stable: clean ones first
    number = np.argsort(order)
    images = [met[i] for i in order]
    text_lens = [len(split.ids) for split in texts]
    grids = [(split.latents.shape[1], split.latents.shape[2]) for split in images]
    image_lens = [height * width for height, width in grids]
    num_causal, num_understanding = sum(text_lens), sum(text_lens) + IMAGE_SPECIAL_TOKENS * len(images)
    num_tokens = num_understanding + sum(image_lens)
    text_starts = np.cumsum([0, *text_lens])
    latent_starts = num_understanding + np.cumsum([0, *image_lens])

    rope_positions = np.zeros(num_tokens, np.int64)
    text_segments: list[Split] = []
    image_segments: dict[int, Split] = {}
    for sample in samples:
        position = 0
        visible = np.zeros(0, np.int64)
        for split in sample:
            if isinstance(split, TextSplit):
                start, end = text_starts[len(text_segments)], text_starts[len(text_segments) + 1]
                rows = np.arange(start, end)
                rope_positions[rows] = position + np.arange(len(rows))
                position += len(rows)
                keys = visible = np.concatenate([visible, rows])
                text_segments.append(Split(rows, keys))
            else:
                image = int(number[len(image_segments)])
                special = num_causal + IMAGE_SPECIAL_TOKENS * image
                latent = np.arange(latent_starts[image], latent_starts[image + 1])
                rows = np.concatenate([[special, special + 1], latent])
                rope_positions[rows] = position
                keys = np.concatenate([visible, rows])
                image_segments[image] = Split(rows, keys)
                if not split.noisy:
                    visible = keys
                    position += 1

    noisy = np.array([split.noisy for split in images], bool)
    segments = [image_segments[image] for image in range(len(images))]
    noisy_lens = [length for length, is_noisy in zip(image_lens, noisy, strict=True) if is_noisy]
    predicted = [split.loss for split in texts for _ in split.ids]
    predicted_rows = np.flatnonzero(predicted)
    text_ids = [id_ for split in texts for id_ in split.ids] + [vision_start_id, vision_end_id] * len(images)
    loss_rows = np.setdiff1d(predicted_rows, text_starts[1:] - 1)
    return PackedBatch(
        text_ids=torch.tensor(text_ids, dtype=torch.int64),
        latents=torch.cat([split.latents.flatten(1).T for split in images]),
        rope_positions=torch.from_numpy(rope_positions),
        grid_positions=torch.cat([grid_positions(height, width, max_side) for height, width in grids]),
        image_index=torch.from_numpy(np.repeat(np.arange(len(images)), image_lens)),
        image_noisy=torch.from_numpy(noisy),
        text_loss_rows=torch.from_numpy(loss_rows),
        text_loss_ids=torch.tensor(text_ids, dtype=torch.int64)[loss_rows + 1],
        attention=build_attention_plan(
            num_tokens,
            text_segments,
            segments,
            outputs=output_plan(
                [split for split, is_noisy in zip(segments, noisy, strict=True) if is_noisy], num_tokens
            ),
        ),
        noisy_attention=within_images(noisy_lens),
        seed=seed,
        sample_ids=tuple(sample_ids),
        num_loss_tokens=sum(noisy_lens),
        num_targets=len(noisy_lens),
    )


def output_plan(noisy: Sequence[Split], num_rows: int) -> AttentionPlan:
    """A plan whose queries are the noisy images' latents alone, numbered from 0; K and V have `num_rows` rows."""
    lengths = [len(split.rows) - IMAGE_SPECIAL_TOKENS for split in noisy]
    starts = np.cumsum([0, *lengths])
    queries = [
        Split(np.arange(start, start + length), split.keys)
        for start, length, split in zip(starts, lengths, noisy, strict=False)
    ]
    return build_attention_plan(sum(lengths), [], queries, num_special=0, num_rows=num_rows)


def within_images(lengths: Sequence[int]) -> AttentionPlan:
    """A plan in which each image attends to itself only; `lengths`: the images' numbers of tokens."""
    starts = np.cumsum([0, *lengths])
    rows = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    return build_attention_plan(sum(lengths), [], [Split(own, own) for own in rows], num_special=0)


def grid_positions(height: int, width: int, max_side: int) -> Tensor:
    """Indices into the position table, int64 [height * width]: y * max_side + x, row-major. Raises UserError."""
    if max(height, width) > max_side:
        raise UserError(
            f"a latent of {height} x {width} does not fit max_side = {max_side}; raise packing.max_side"
        )
    return (torch.arange(height)[:, None] * max_side + torch.arange(width)).reshape(-1)
