"""The parts of LightningDiT and DiTDH, under the names of the published checkpoints.

Sources: Yao et al. 2025 (LightningDiT: SwiGLU, RMSNorm, QK-norm, RoPE on two axes), Zheng et al. 2025 (RAE: Gaussian
Fourier times), Peebles and Xie 2023 (adaLN-Zero).

Shape suffixes: B images, T tokens (Y * X places, or patches of them), D width, N heads, H head dim, C latent channels.
Conditions are [B, 1, D] (one for an image) or [B, T, D] (one for each token).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.class_conditional.config import mlp_width
from generator.config import MAX_PERIOD
from generator.embeddings import grid_sinusoids
from generator.mot import EMBEDDING_STD
from tokenizer.norms import RmsNorm

TIME_FREQUENCIES = 256
TIME_MLP_STD = 0.02
Rope = tuple[Tensor, Tensor]


class PatchEmbedding(nn.Module):
    """Patches of latents -> tokens."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, T, D], row by row."""
        tokens: Tensor = self.proj(x_BCYX.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return tokens


class FourierTime(nn.Module):
    """Linear, SiLU, Linear on [sin(2 pi t w), cos(2 pi t w)], w ~ N(0, 1) drawn once and kept (Tancik et al. 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(TIME_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """fp32 [B] in [0, 1] -> [B, D]."""
        angles = 2 * math.pi * t_B.float()[:, None] * self.W.float()
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        embedded: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return embedded


class ClassEmbedding(nn.Module):
    """A row for each class, and a last one for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        """int64 [B] -> [B, D]."""
        rows: Tensor = self.embedding_table(labels_B)
        return rows


class SelfAttention(nn.Module):
    """Attention among all tokens of an image, with 2-D rotary positions."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RmsNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        parts = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q_BNTH, k_BNTH, v_BNTH = parts.unbind(0)
        q_BNTH = rotate_pairs(self.q_norm(q_BNTH), rope).to(v_BNTH.dtype)
        k_BNTH = rotate_pairs(self.k_norm(k_BNTH), rope).to(v_BNTH.dtype)
        attended = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class SwiGluMlp(nn.Module):
    """w3(silu(a) * b) with [a, b] = w12(x), with biases (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * mlp_width(width))
        self.w3 = nn.Linear(mlp_width(width), width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.w12(x_BTD).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Attention and MLP, each normed, scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width, eps=1e-6)
        self.norm2 = RmsNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, num_heads, qk_norm)
        self.mlp = SwiGluMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BTD: Tensor, condition: Tensor, rope: Rope) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x_BTD = x_BTD + gate_a * self.attn(modulate(self.norm1(x_BTD), shift_a, scale_a), rope)
        out: Tensor = x_BTD + gate_m * self.mlp(modulate(self.norm2(x_BTD), shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """Tokens -> velocities of the tokens' patches."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.norm_final = RmsNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BTD: Tensor, condition: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, P * P * C]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm_final(x_BTD), shift, scale))
        return out


def modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BTD * (1 + scale) + shift


def rope_2d(grid: tuple[int, int], head_dim: int, device: torch.device) -> Rope:
    """cos and sin of p theta^(-k / (H/4)), k < H/4, theta = 10,000; first p = y, then p = x. fp32 [T, H/2]."""
    quarter = head_dim // 4
    frequencies = MAX_PERIOD ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    y, x = (torch.arange(side, device=device, dtype=torch.float32)[:, None] * frequencies for side in grid)
    of_y = y[:, None].expand(-1, grid[1], -1)
    of_x = x[None].expand(grid[0], -1, -1)
    angles = torch.cat([of_y, of_x], dim=2).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate_pairs(x_BNTH: Tensor, rope: Rope) -> Tensor:
    """Rotates the pairs (2k, 2k + 1) in fp32; generator.mot.rotate pairs k with k + H/2."""
    cos, sin = rope
    first, second = x_BNTH[..., 0::2], x_BNTH[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def position_table(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed 2-D sin-cos table that is added to the tokens, fp32 [1, T, D]."""
    rows = torch.arange(grid[0])[:, None] * max(grid) + torch.arange(grid[1])
    return grid_sinusoids(rows.flatten(), max(grid), width)[None]


def unpatchify(out_BTO: Tensor, channels: int, grid: tuple[int, int], patch: int) -> Tensor:
    """[B, T, P * P * C] (channels last in a patch) -> [B, C, Y, X]."""
    places = out_BTO.view(len(out_BTO), *grid, patch, patch, channels)
    return places.permute(0, 5, 1, 3, 2, 4).reshape(len(out_BTO), channels, grid[0] * patch, grid[1] * patch)


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """The inverse of `unpatchify`: [B, C, Y, X] -> [B, T, P * P * C]."""
    count, channels, height, width = x_BCYX.shape
    cut = x_BCYX.reshape(count, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch * patch * channels)


@torch.no_grad()
def init_parts(model: nn.Module, generator: torch.Generator, *, gain: float) -> None:
    """Fills the weights at random from `generator` alone, so that velocities start at exactly zero.

    Linear: U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)), biases 0; embeddings, time MLP: N(0, 0.02^2); norms 1; the
    modulating layers and the last layer: 0, so that every block is the identity (adaLN-Zero).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_out, fan_in = module.weight.flatten(1).shape
            bound = gain * math.sqrt(6 / (fan_in + fan_out))
            module.weight.uniform_(-bound, bound, generator=generator)
            assert module.bias is not None
            module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, EMBEDDING_STD, generator=generator)
        elif isinstance(module, RmsNorm):
            module.weight.fill_(1.0)
    for module in model.modules():
        if isinstance(module, FourierTime):
            module.W.normal_(0.0, 1.0, generator=generator)
            for linear in _linears(module.mlp):
                linear.weight.normal_(0.0, TIME_MLP_STD, generator=generator)
        elif isinstance(module, Block | FinalLayer):
            zero(_linears(module.adaLN_modulation))
        if isinstance(module, FinalLayer):
            zero([module.linear])


def _linears(modules: nn.Sequential) -> list[nn.Linear]:
    return [module for module in modules if isinstance(module, nn.Linear)]


def zero(linears: Sequence[nn.Linear]) -> None:
    """Sets weights and biases to 0."""
    for linear in linears:
        linear.weight.zero_()
        linear.bias.zero_()
