"""Packs of made-up samples, and attention by the rule of docs/architecture.md, section 4, as one dense mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch

Splits = list[TextSplit | ImageSplit]


def image(seed: int, *, noisy: bool, shape: tuple[int, int, int] = (4, 3, 3)) -> ImageSplit:
    return ImageSplit(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), noisy)


def pack(samples: list[Splits], *, max_side: int = 4, seed: int = 7) -> PackedBatch:
    """One pack; the ids around an image are those of helpers.texts.Letters, the samples are named 0, 1, ..."""
    names = [str(number) for number in range(len(samples))]
    return build_packed_batch(
        samples, vision_start_id=28, vision_end_id=29, max_side=max_side, seed=seed, sample_ids=names
    )


def times_of(batch: PackedBatch) -> Tensor:
    """A time for each image: 0 for clean ones."""
    return torch.where(batch.image_noisy, torch.linspace(0.2, 0.9, len(batch.image_noisy)), 0.0)


def token_table(samples: list[Splits]) -> Tensor:
    """int64 [4, T]: sample, split, place in a text (-1 in images), whether a target. Rows in storage order: texts,
    specials, latents; clean images first."""
    texts, specials, latents = [], [], []
    for is_target in (False, True):
        for number, sample in enumerate(samples):
            for order, split in enumerate(sample):
                if isinstance(split, TextSplit):
                    texts += [] if is_target else [(number, order, i, False) for i in range(len(split.ids))]
                elif split.noisy == is_target:
                    specials += [(number, order, -1, is_target)] * 2
                    latents += [(number, order, -1, is_target)] * split.latents[0].numel()
    return torch.tensor(texts + specials + latents, dtype=torch.int64).T


def rule_mask(table: Tensor) -> Tensor:
    """bool [T, T]: whether the row's token sees the column's, from columns of `token_table`."""
    sample, order, place, target = table
    earlier = (order[None] < order[:, None]) & ~target.bool()[None]
    own = (order[None] == order[:, None]) & ((place[:, None] < 0) | (place[None] <= place[:, None]))
    return (sample[:, None] == sample[None]) & (earlier | own)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [Q, N, H], k and v [K, M, H] with M a divisor of N, mask bool [Q, K] -> [Q, N, H]; softmax in fp32."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~mask, -math.inf).softmax(-1), v)
