"""LightningDiT and DiTDH written out as their papers' formulas, one step a line: the reference of the parity tests.

Attention is a softmax of products, RoPE a product of complex numbers, and every table is built from its definition.
Nothing of generator/ is used, so an error there cannot hide here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PlainShape:
    """The shape's numbers that the weights do not tell."""

    num_layers: int
    num_heads: int
    patch: int = 1
    num_head_layers: int = 0  # DiTDH's
    num_head_heads: int = 0


def plain_velocity(w: Weights, shape: PlainShape, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """v [B, C, Y, X] of noisy latents x at times t for classes `labels`, in the dtype of x."""
    angles = 2 * math.pi * t[:, None] * w["t_embedder.W"][None, :]
    waves = torch.cat((torch.sin(angles), torch.cos(angles)), dim=1)
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", waves)))
    condition = (time + w["y_embedder.embedding_table.weight"][labels])[:, None, :]
    side_y, side_x = x.shape[2] // shape.patch, x.shape[3] // shape.patch
    patches = cut(x, shape.patch)
    if not shape.num_head_layers:
        tokens = embed(w, "x_embedder", patches) + positions(side_y, side_x, time.shape[1]).to(x)
    else:
        condition = silu(condition)
        tokens = embed(w, "s_embedder", patches) + positions(side_y, side_x, time.shape[1]).to(x)
    for layer in range(shape.num_layers):
        tokens = block(w, f"blocks.{layer}", tokens, condition, shape.num_heads, side_y, side_x)
    if shape.num_head_layers:
        condition = silu(time[:, None, :] + tokens)
        if "s_projector.weight" in w:
            condition = linear(w, "s_projector", condition)
        tokens = embed(w, "x_embedder", patches)
        for layer in range(shape.num_layers, shape.num_layers + shape.num_head_layers):
            tokens = block(w, f"blocks.{layer}", tokens, condition, shape.num_head_heads, side_y, side_x)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(condition)).chunk(2, dim=-1)
    normed = rms_norm(tokens, w["final_layer.norm_final.weight"]) * (1 + scale) + shift
    return paste(linear(w, "final_layer.linear", normed), x.shape, shape.patch)


def block(
    w: Weights, name: str, x: Tensor, condition: Tensor, num_heads: int, side_y: int, side_x: int
) -> Tensor:
    """x + gate * attention(...), then the sum + gate * MLP(...)."""
    six = linear(w, f"{name}.adaLN_modulation.1", silu(condition)).chunk(6, dim=-1)
    normed = rms_norm(x, w[f"{name}.norm1.weight"]) * (1 + six[1]) + six[0]
    q, k, v = linear(w, f"{name}.attn.qkv", normed).chunk(3, dim=-1)
    heads = []
    for q_h, k_h, v_h in zip(
        q.chunk(num_heads, -1), k.chunk(num_heads, -1), v.chunk(num_heads, -1), strict=True
    ):
        if f"{name}.attn.q_norm.weight" in w:
            q_h = rms_norm(q_h, w[f"{name}.attn.q_norm.weight"])
            k_h = rms_norm(k_h, w[f"{name}.attn.k_norm.weight"])
        q_h, k_h = turn(q_h, side_y, side_x), turn(k_h, side_y, side_x)
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
        heads.append(torch.softmax(scores, dim=-1) @ v_h)
    x = x + six[2] * linear(w, f"{name}.attn.proj", torch.cat(heads, dim=-1))
    normed = rms_norm(x, w[f"{name}.norm2.weight"]) * (1 + six[4]) + six[3]
    gate, up = linear(w, f"{name}.mlp.w12", normed).chunk(2, dim=-1)
    return x + six[5] * linear(w, f"{name}.mlp.w3", silu(gate) * up)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x)."""
    return x / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean x^2 + 1e-6) times a weight for each channel."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-6) * weight


def turn(x: Tensor, side_y: int, side_x: int) -> Tensor:
    """RoPE: channels (2k, 2k+1) as complex numbers, times e^(i p f_k); the first half rotates by y, the second by x."""
    count = x.shape[-1] // 4
    rates = torch.tensor([10_000 ** (-k / count) for k in range(count)], dtype=torch.float64)
    rows = [torch.cat((y * rates, column * rates)) for y in range(side_y) for column in range(side_x)]
    spin = torch.polar(torch.ones(len(rows), 2 * count, dtype=torch.float64), torch.stack(rows))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * spin.to(pairs.device, pairs.dtype)).flatten(-2)


def positions(side_y: int, side_x: int, width: int) -> Tensor:
    """sin and cos of x, then of y, fp64 [Y * X, width]."""
    count = width // 4
    rates = torch.tensor([10_000 ** (-k / count) for k in range(count)], dtype=torch.float64)
    rows = []
    for y in range(side_y):
        for x in range(side_x):
            rows.append(
                torch.cat(
                    (torch.sin(x * rates), torch.cos(x * rates), torch.sin(y * rates), torch.cos(y * rates))
                )
            )
    return torch.stack(rows)


def cut(x: Tensor, patch: int) -> Tensor:
    """[B, C, Y, X] -> [B, T, C * P * P], channels first in a patch."""
    rows = []
    for y in range(0, x.shape[2], patch):
        for column in range(0, x.shape[3], patch):
            rows.append(x[:, :, y : y + patch, column : column + patch].flatten(1))
    return torch.stack(rows, dim=1)


def embed(w: Weights, name: str, patches: Tensor) -> Tensor:
    """The convolution of each patch, written as a product."""
    return patches @ w[f"{name}.proj.weight"].flatten(1).T + w[f"{name}.proj.bias"]


def paste(out: Tensor, shape: torch.Size, patch: int) -> Tensor:
    """The inverse of `cut` for [B, T, P * P * C], channels last in a patch."""
    image = out.new_zeros(shape)
    token = 0
    for y in range(0, shape[2], patch):
        for column in range(0, shape[3], patch):
            piece = out[:, token].view(shape[0], patch, patch, shape[1])
            image[:, :, y : y + patch, column : column + patch] = piece.permute(0, 3, 1, 2)
            token += 1
    return image
