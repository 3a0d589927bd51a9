"""The wide, shallow head that may stand between the backbone and the velocity.

Source: Wang et al. 2025 (DDT: a decoder conditioned on the encoder's output), Zheng et al. 2025 (RAE: width 2048, two
layers, because a model of latents should be wider than their channels).

Shape suffixes: T noisy latent tokens, I images, C latent channels, D backbone width, W head width, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.compiling import Compiler, backend_for, whole
from generator.config import DdtHeadConfig
from generator.embeddings import LatentEmbedding
from generator.mot import SwiGlu
from tokenizer.norms import RmsNorm

WithinImages = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention within each image: q, k, v [T, N, H] -> [T, N, H]."""


class DdtHead(nn.Module):
    """Layers that read the noisy latents again, modulated token by token by the backbone's output (adaLN-Zero)."""

    def __init__(
        self, config: DdtHeadConfig, channels: int, backbone_width: int, max_side: int, max_period: float
    ) -> None:
        super().__init__()
        self.latent_embedding = LatentEmbedding(channels, config.width, max_side, max_period)
        self.condition = nn.Linear(backbone_width, config.width)
        self.layers = nn.ModuleList(DdtLayer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.width, eps=config.norm_eps, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)

    def forward(
        self,
        hidden_TD: Tensor,
        x_TC: Tensor,
        t_I: Tensor,
        image_index_T: Tensor,
        grid_T: Tensor,
        attention: WithinImages,
    ) -> Tensor:
        """[T, W], the input of the linear map to velocities. `x_TC`, `t_I`, ...: see LatentEmbedding."""
        x_TW = self.latent_embedding(x_TC, t_I, image_index_T, grid_T)
        time_IW = self.latent_embedding.time_embedding(t_I)
        condition_TW = F.silu(self.condition(hidden_TD) + time_IW.index_select(0, image_index_T))
        for layer in self.layers:
            x_TW = layer(x_TW, condition_TW, attention)
        shift_TW, scale_TW = self.modulation(condition_TW).chunk(2, dim=1)
        return _modulate(self.norm(x_TW), shift_TW, scale_TW)

    def compile_layers(self, backend: Compiler) -> None:
        """Compiles every layer; see Mot.compile_layers."""
        for layer in self.layers:
            assert isinstance(layer, DdtLayer)
            layer.backend = backend

    @torch.no_grad()
    def reset_modulation(self) -> None:
        """adaLN-Zero (Peebles and Xie 2023): at the start every layer is the identity."""
        for layer in (*self.layers, self):
            assert isinstance(layer.modulation, nn.Linear)
            layer.modulation.weight.zero_()
            layer.modulation.bias.zero_()


class DdtLayer(nn.Module):
    """LightningDiT's block: adaLN, QK-norm, SwiGLU. `backend`: see MotLayer."""

    def __init__(self, config: DdtHeadConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.num_heads = config.num_heads
        self.backend: Compiler | None = None
        self.modulation = nn.Linear(width, 6 * width)
        self.attention_norm = RmsNorm(width, eps=eps, elementwise_affine=False)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.q_norm = RmsNorm(width // config.num_heads, eps=eps)
        self.k_norm = RmsNorm(width // config.num_heads, eps=eps)
        self.o_proj = nn.Linear(width, width)
        self.mlp_norm = RmsNorm(width, eps=eps, elementwise_affine=False)
        self.mlp = SwiGlu(width, config.mlp_width)

    def forward(self, x_TW: Tensor, condition_TW: Tensor, attention: WithinImages) -> Tensor:
        """[T, W] -> [T, W]"""
        backend = backend_for(self.backend, x_TW, condition_TW)
        q_TNH, k_TNH, v_TNH, modulation_TE = whole(DdtLayer.heads, backend)(self, x_TW, condition_TW)
        attended_TNH = attention(q_TNH, k_TNH, v_TNH)
        wide = self.mlp.wide() if backend_for(backend, attended_TNH, modulation_TE) else None
        return whole(DdtLayer.finish, backend)(self, x_TW, attended_TNH, modulation_TE, wide)

    def heads(self, x_TW: Tensor, condition_TW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [T, N, H]; shifts, scales and gates of attention and MLP [T, 6 W]."""
        modulation_TE: Tensor = self.modulation(condition_TW)
        shift_TW, scale_TW = modulation_TE.chunk(6, dim=1)[:2]
        qkv_TW = self.qkv_proj(_modulate(self.attention_norm(x_TW), shift_TW, scale_TW))
        q_TNH, k_TNH, v_TNH = (part.unflatten(1, (self.num_heads, -1)) for part in qkv_TW.chunk(3, dim=1))
        return self.q_norm(q_TNH), self.k_norm(k_TNH), v_TNH, modulation_TE

    def finish(
        self, x_TW: Tensor, attended_TNH: Tensor, modulation_TE: Tensor, wide: Tensor | None
    ) -> Tensor:
        """Output projection, residual, MLP (`wide`: its stacked weights), residual."""
        _, _, gate_a, shift_m, scale_m, gate_m = modulation_TE.chunk(6, dim=1)
        x_TW = x_TW + gate_a * self.o_proj(attended_TNH.flatten(1))
        out: Tensor = x_TW + gate_m * self.mlp(_modulate(self.mlp_norm(x_TW), shift_m, scale_m), wide)
        return out


def _modulate(x_TW: Tensor, shift_TW: Tensor, scale_TW: Tensor) -> Tensor:
    return x_TW * (1 + scale_TW) + shift_TW
