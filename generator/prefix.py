"""Computes a pack's prefix once for all sampling steps, as text and clean images do not change between steps.

No other split sees a noisy image. A pack therefore falls into a prefix, which needs nothing of the noisy rows, and
the noisy rows, which need the prefix only as keys and values.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.packs.attention_plan import AttentionPlan, Rows, Split, build_attention_plan
from data.packs.packed_batch import IMAGE_SPECIAL_TOKENS, PackedBatch, output_plan, within_images
from generator.attention import JointAttention, attend, choose_backend
from generator.config import Backend


def split_prefix(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """Splits `batch` into (prefix, noisy): two packs of its rows, on the CPU, in its order.

    The noisy pack's plan counts its keys in [rows of the prefix, rows of the noisy part]: see PrefixCache.
    """
    texts, images = _splits(batch)
    noisy = batch.image_noisy.tolist()
    is_noisy = np.zeros(batch.attention.num_tokens, bool)
    for image, split in enumerate(images):
        is_noisy[split.rows] = noisy[image]
    rank = np.where(is_noisy, np.cumsum(is_noisy), np.cumsum(~is_noisy)) - 1  # row within its part
    in_cache = rank + np.where(is_noisy, np.count_nonzero(~is_noisy), 0)
    prefix_texts = [Split(rank[split.rows], rank[split.keys]) for split in texts]
    prefix_images = [
        Split(rank[split.rows], rank[split.keys]) for image, split in enumerate(images) if not noisy[image]
    ]
    noisy_images = [
        Split(rank[split.rows], in_cache[split.keys]) for image, split in enumerate(images) if noisy[image]
    ]
    keep = torch.from_numpy(is_noisy)
    num_rows, num_noisy = len(keep), int(keep.sum())
    num_prefix = num_rows - num_noisy
    prefix_plan = build_attention_plan(
        num_prefix, prefix_texts, prefix_images, outputs=output_plan([], num_prefix)
    )
    noisy_plan = build_attention_plan(
        num_noisy, [], noisy_images, num_rows=num_rows, outputs=output_plan(noisy_images, num_rows)
    )
    return _rows(batch, ~keep, prefix_plan, noisy=False), _rows(batch, keep, noisy_plan, noisy=True)


class PrefixCache:
    """Keys and values of the prefix, one pair per layer: filled by one forward pass, read by every step after
    it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._layers: list[tuple[Tensor, Tensor]] = []

    def fill(self, plan: AttentionPlan) -> JointAttention:
        """The attention of the prefix's own pass, which also stores the prefix's keys and values."""

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert layer == len(self._layers), "the cache is filled by one pass"
            self._layers.append((k, v))
            kernel = choose_backend(q.device, q.dtype, self._backend, q.shape[2])
            return attend(q, k, v, plan.of(len(q)), kernel)

        return attention

    def extend(self, plan: AttentionPlan) -> JointAttention:
        """The attention of the noisy rows: their keys and values follow the cached ones."""

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cached_k, cached_v = self._layers[layer]
            k, v = torch.cat([cached_k, k]), torch.cat([cached_v, v])
            kernel = choose_backend(q.device, q.dtype, self._backend, q.shape[2])
            return attend(q, k, v, plan.of(len(q)), kernel)

        return attention


def _splits(batch: PackedBatch) -> tuple[list[Split], list[Split]]:
    """Text and image splits of a pack, read back from its plan."""
    plan, num_images = batch.attention, len(batch.image_noisy)
    starts = np.cumsum([0, *plan.causal.q_lens])
    text_keys = np.split(plan.causal.kv_index.numpy(), np.cumsum(plan.causal.k_lens)[:-1])
    texts = [
        Split(np.arange(start, start + length), keys)
        for start, length, keys in zip(starts, plan.causal.q_lens, text_keys, strict=False)
    ]
    image_keys = np.split(plan.full.kv_index.numpy(), np.cumsum(plan.full.k_lens)[:-1])[:num_images]
    return texts, [Split(_image_rows(batch, image), keys) for image, keys in enumerate(image_keys)]


def _image_rows(batch: PackedBatch, image: int) -> Rows:
    special = batch.attention.num_causal + IMAGE_SPECIAL_TOKENS * image + np.arange(IMAGE_SPECIAL_TOKENS)
    latent = len(batch.text_ids) + np.flatnonzero(batch.image_index.numpy() == image)
    return np.concatenate([special, latent])


def _rows(batch: PackedBatch, keep: Tensor, plan: AttentionPlan, *, noisy: bool) -> PackedBatch:
    """The kept rows of `batch` under another plan, with images numbered anew."""
    keep_text, keep_latent = keep[: len(batch.text_ids)], keep[len(batch.text_ids) :]
    kept_images = batch.image_noisy == noisy
    new_number = kept_images.cumsum(0) - 1
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        batch,
        text_ids=batch.text_ids[keep_text],
        latents=batch.latents[keep_latent],
        rope_positions=batch.rope_positions[keep],
        grid_positions=batch.grid_positions[keep_latent],
        image_index=new_number[batch.image_index[keep_latent]],
        image_noisy=batch.image_noisy[kept_images],
        text_loss_rows=none,  # sampling trains nothing
        text_loss_ids=none,
        attention=plan,
        noisy_attention=batch.noisy_attention if noisy else within_images([]),
        num_loss_tokens=batch.num_loss_tokens if noisy else 0,
        num_targets=batch.num_targets if noisy else 0,
    )
