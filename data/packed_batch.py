"""Splits -> one packed batch (contract 3), with the tokens of each expert stored together.

Shapes: Tu understanding tokens (text and special tokens), Tg generation (latent) tokens, C latent channels,
I images, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.attention_plan import AttentionPlan, Split, build_attention_plan
from engine.config import UserError

TEXT_SPECIAL_TOKENS = 2  # <|im_start|>, <|im_end|>
IMAGE_SPECIAL_TOKENS = 2  # <|vision_start|>, <|vision_end|>


@dataclass(frozen=True)
class TextSplit:
    """Text that attends causally."""

    ids: Sequence[int]  # <|im_start|> and <|im_end|> included


@dataclass(frozen=True)
class ImageSplit:
    """A latent image that attends fully. A noisy one is a target, which no later split sees."""

    latents: Tensor  # float32 [C, Y, X], clean, normalised
    noisy: bool


@dataclass(frozen=True)
class PackedBatch:
    """One pack. Tokens are stored by expert: rows 0 .. Tu - 1 understanding, Tu .. Tu + Tg - 1 generation.

    Latents are clean: the objective draws timesteps and noise from `seed` and replaces those of noisy images.
    """

    text_ids: Tensor  # int64 [Tu]: all text splits, then <|vision_start|>, <|vision_end|> of every image
    latents: Tensor  # float32 [Tg, C], normalised, image after image, row-major over (y, x)
    rope_positions: Tensor  # int64 [Tu + Tg]
    grid_positions: Tensor  # int64 [Tg], y * max_side + x
    image_index: Tensor  # int64 [Tg], in [0, I)
    image_noisy: Tensor  # bool [I]
    loss_mask: Tensor  # bool [Tg], True on the tokens of noisy images
    attention: AttentionPlan
    seed: int  # 63 bits, of (run seed, global step, stream)
    sample_ids: tuple[str, ...]
    num_loss_tokens: int  # loss_mask.sum(), known without a device sync

    def to(self, device: torch.device) -> PackedBatch:
        """A copy with every tensor on `device`."""
        return replace(
            self,
            text_ids=self.text_ids.to(device, non_blocking=True),
            latents=self.latents.to(device, non_blocking=True),
            rope_positions=self.rope_positions.to(device, non_blocking=True),
            grid_positions=self.grid_positions.to(device, non_blocking=True),
            image_index=self.image_index.to(device, non_blocking=True),
            image_noisy=self.image_noisy.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            attention=self.attention.to(device),
        )


def build_packed_batch(
    samples: Sequence[Sequence[TextSplit | ImageSplit]],
    *,
    vision_start_id: int,
    vision_end_id: int,
    max_side: int,
    seed: int,
    sample_ids: Sequence[str],
) -> PackedBatch:
    """Packs samples, each a list of splits with at least one image in the pack (Bagel's layout, see spec).

    RoPE: text runs on; all tokens of an image split share one position; after a clean image the next split
    starts one further, after a noisy one at the same position. Raises UserError when a latent is larger than
    `max_side`.
    """
    splits = [split for sample in samples for split in sample]
    texts = [split for split in splits if isinstance(split, TextSplit)]
    images = [split for split in splits if isinstance(split, ImageSplit)]
    text_lens = [len(split.ids) for split in texts]
    grids = [(split.latents.shape[1], split.latents.shape[2]) for split in images]
    image_lens = [height * width for height, width in grids]
    num_causal, num_understanding = sum(text_lens), sum(text_lens) + IMAGE_SPECIAL_TOKENS * len(images)
    num_tokens = num_understanding + sum(image_lens)
    text_starts = np.cumsum([0, *text_lens])
    latent_starts = num_understanding + np.cumsum([0, *image_lens])

    rope_positions = np.zeros(num_tokens, np.int64)
    text_segments: list[Split] = []
    image_segments: list[Split] = []
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
                image = len(image_segments)
                special = num_causal + IMAGE_SPECIAL_TOKENS * image
                latent = np.arange(latent_starts[image], latent_starts[image + 1])
                rows = np.concatenate([[special, special + 1], latent])
                rope_positions[rows] = position
                keys = np.concatenate([visible, rows])
                image_segments.append(Split(rows, keys))
                if not split.noisy:
                    visible = keys
                    position += 1

    noisy = np.array([split.noisy for split in images], bool)
    image_index = np.repeat(np.arange(len(images)), image_lens)
    text_ids = [id_ for split in texts for id_ in split.ids] + [vision_start_id, vision_end_id] * len(images)
    return PackedBatch(
        text_ids=torch.tensor(text_ids, dtype=torch.int64),
        latents=torch.cat([split.latents.flatten(1).T for split in images]),
        rope_positions=torch.from_numpy(rope_positions),
        grid_positions=torch.cat([grid_positions(height, width, max_side) for height, width in grids]),
        image_index=torch.from_numpy(image_index),
        image_noisy=torch.from_numpy(noisy),
        loss_mask=torch.from_numpy(noisy[image_index]),
        attention=build_attention_plan(num_tokens, text_segments, image_segments),
        seed=seed,
        sample_ids=tuple(sample_ids),
        num_loss_tokens=sum(n for n, split in zip(image_lens, images, strict=True) if split.noisy),
    )


def grid_positions(height: int, width: int, max_side: int) -> Tensor:
    """int64 [height * width]: y * max_side + x, row-major."""
    if max(height, width) > max_side:
        raise UserError(
            f"a latent of {height} x {width} does not fit max_side = {max_side}; raise packing.max_side"
        )
    return (torch.arange(height)[:, None] * max_side + torch.arange(width)).reshape(-1)
