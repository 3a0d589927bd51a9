"""The mixture of transformers as Bagel's published training code runs it, to compare with in benchmarks/mot.py.

Tokens stay in the order of the sequence. In every layer each expert's tokens are gathered, worked on and scattered back
into a tensor of all tokens, for norms, q, k, v, QK-norm, output projection and MLP. Attention takes a dense mask for
each sample. Modules and weights are our own.

Shape suffixes: T tokens in sequence order, D width, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from generator.mot import Expert, Mot, MotLayer, rope_table, rotate


@dataclass(frozen=True)
class Sequenced:
    """A pack in the order of the sequence."""

    text_index: Tensor  # int64 [U] positions of understanding tokens in the sequence
    latent_index: Tensor  # int64 [G] positions of generation tokens in the sequence
    positions: Tensor  # int64 [T]
    lengths: tuple[int, ...]  # tokens of each sample
    masks: tuple[Tensor, ...]  # bool [1, L, L] of each sample, True = attend


def forward(model: Mot, x_UD: Tensor, x_GD: Tensor, pack: Sequenced) -> Tensor:
    """Normed outputs of the generation tokens, [G, D]."""
    rope = rope_table(pack.positions, model.config.head_dim, model.config.rope_theta)
    x_TD = _scatter(x_UD, x_GD, pack)
    for layer in model.layers:
        assert isinstance(layer, MotLayer)
        x_TD = _layer(layer, x_TD, rope, pack)
    out_TD = _by_expert(x_TD, pack, model.understanding_norm, model.generation_norm)
    return out_TD[pack.latent_index]


def _layer(layer: MotLayer, x_TD: Tensor, rope: tuple[Tensor, Tensor], pack: Sequenced) -> Tensor:
    text, latent = layer.understanding, layer.generation
    assert isinstance(text, Expert) and isinstance(latent, Expert)
    normed_TD = _by_expert(x_TD, pack, text.input_layernorm, latent.input_layernorm)
    heads = []
    for name in ("q_proj", "k_proj", "v_proj"):
        projected = _by_expert(normed_TD, pack, getattr(text, name), getattr(latent, name))
        heads.append(projected.unflatten(-1, (-1, text.head_dim)))
    q_TNH, k_TKH, v_TKH = heads
    q_TNH = rotate(_by_expert(q_TNH, pack, text.q_norm, latent.q_norm), rope, v_TKH.dtype)
    k_TKH = rotate(_by_expert(k_TKH, pack, text.k_norm, latent.k_norm), rope, v_TKH.dtype)
    attended_TD = torch.cat(
        [
            _attend(q, k, v, mask)
            for q, k, v, mask in zip(
                q_TNH.split(pack.lengths),
                k_TKH.split(pack.lengths),
                v_TKH.split(pack.lengths),
                pack.masks,
                strict=True,
            )
        ]
    )
    x_TD = x_TD + _by_expert(attended_TD, pack, text.o_proj, latent.o_proj)
    normed_TD = _by_expert(x_TD, pack, text.post_attention_layernorm, latent.post_attention_layernorm)
    return x_TD + _by_expert(normed_TD, pack, text.mlp, latent.mlp)


def _attend(q_LNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LNH, k_LKH, v_LKH))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def _by_expert(x: Tensor, pack: Sequenced, text: torch.nn.Module, latent: torch.nn.Module) -> Tensor:
    return _scatter(text(x[pack.text_index]), latent(x[pack.latent_index]), pack)


def _scatter(text: Tensor, latent: Tensor, pack: Sequenced) -> Tensor:
    out = text.new_zeros((len(text) + len(latent), *text.shape[1:]))
    out[pack.text_index] = text
    out[pack.latent_index] = latent
    return out


def sequenced(samples: Sequence[tuple[int, int]], grid_tokens: int) -> Sequenced:
    """Text-to-image samples (text tokens, images) as [text, noisy images]; an image has two special tokens."""
    text_index: list[int] = []
    latent_index: list[int] = []
    positions: list[int] = []
    lengths, masks = [], []
    start = 0
    for text_tokens, num_images in samples:
        length = text_tokens + num_images * (grid_tokens + 2)
        split = torch.zeros(length, dtype=torch.int64)
        text_index += range(start, start + text_tokens)
        positions += range(text_tokens)
        for image in range(num_images):
            first = text_tokens + image * (grid_tokens + 2)
            split[first : first + grid_tokens + 2] = image + 1
            text_index += [start + first, start + first + grid_tokens + 1]
            latent_index += range(start + first + 1, start + first + 1 + grid_tokens)
            positions += [text_tokens] * (grid_tokens + 2)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same_image = (split[:, None] == split[None]) & (split[:, None] > 0)
        masks.append(((causal & (split[None] == 0)) | same_image)[None])
        lengths.append(length)
        start += length
    index = (torch.tensor(text_index), torch.tensor(latent_index), torch.tensor(positions))
    return Sequenced(*index, tuple(lengths), tuple(masks))
