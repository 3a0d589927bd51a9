"""Mixture of transformers in Qwen2's shape (Bagel): two experts, one joint attention in every layer.

Text and special tokens run through the understanding expert, latent tokens through the generation expert.
Tokens are stored expert-contiguous, so each expert works on a plain slice. Only the attention sees the tokens
of both.

Shape suffixes: T tokens (U understanding, G generation, T = U + G), D width, N query heads, K key/value
heads, H head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from generator.attention import JointAttention
from generator.compiling import Compiler, backend_for, whole
from generator.config import MotConfig
from generator.joined_products import stacked
from tokenizer.norms import RmsNorm

EMBEDDING_STD = 0.02
MIMETIC_SHARE = 0.7  # share of the common basis in W_q and W_k
MIMETIC_OUTPUT = 0.5  # scale of the attended values in W_o, shared by the query heads of one key

Rope = tuple[Tensor, Tensor]
"""cos and sin, as `rope_table` returns them."""


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_TD: Tensor, wide: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D]. `wide`: the result of `wide()`, for one product; None: two products."""
        if wide is None:
            gate_TM, up_TM = self.gate_proj(x_TD), self.up_proj(x_TD)
        else:
            gate_TM, up_TM = F.linear(x_TD, wide).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate_TM) * up_TM)
        return out

    def wide(self) -> Tensor:
        """The weights of gate and up, stacked by rows."""
        return stacked(self.gate_proj, self.up_proj)


class Expert(nn.Module):
    """One expert's share of one layer: everything of a Qwen2 decoder layer except the attention itself.

    Parameter names follow Qwen2's, so that published weights map by prefix.
    """

    def __init__(self, config: MotConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, eps, bias = config.width, config.norm_eps, config.qkv_bias
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.input_layernorm = RmsNorm(width, eps=eps)
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.q_norm = RmsNorm(config.head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(config.head_dim, eps=eps) if config.qk_norm else nn.Identity()
        self.post_attention_layernorm = RmsNorm(width, eps=eps)
        self.mlp = SwiGlu(width, config.mlp_width)

    def queries(self, normed_TD: Tensor) -> Tensor:
        """[T, D] -> [T, N, H], before rotation."""
        out: Tensor = self.q_norm(self.q_proj(normed_TD).unflatten(-1, (-1, self.head_dim)))
        return out

    def keys_values(self, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> k, v [T, K, H], before rotation."""
        k_TKH: Tensor = self.k_norm(self.k_proj(normed_TD).unflatten(-1, (-1, self.head_dim)))
        v_TKH: Tensor = self.v_proj(normed_TD).unflatten(-1, (-1, self.head_dim))
        return k_TKH, v_TKH

    def heads(self, x_TD: Tensor, wide: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, N, H], k, v [T, K, H], before rotation. `wide`: the result of `wide()`, for one
        product; None: three products."""
        normed_TD = self.input_layernorm(x_TD)
        if wide is None:
            k_TKH, v_TKH = self.keys_values(normed_TD)
            return self.queries(normed_TD), k_TKH, v_TKH
        linears = (self.q_proj, self.k_proj, self.v_proj)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        out_TE = F.linear(normed_TD, wide, torch.cat(tuple(biases)) if biases else None)
        parts = torch.split(out_TE, [linear.out_features for linear in linears], dim=-1)
        q_TNH, k_TKH, v_TKH = (part.view(len(part), -1, self.head_dim) for part in parts)
        return self.q_norm(q_TNH), self.k_norm(k_TKH), v_TKH

    def wide(self) -> Tensor:
        """The weights of q, k and v, stacked by rows."""
        return stacked(self.q_proj, self.k_proj, self.v_proj)

    def finish(self, x_TD: Tensor, attended_TNH: Tensor, wide: Tensor | None) -> Tensor:
        """Output projection, residual, MLP (`wide`: the MLP's stacked weights), residual."""
        x_TD = x_TD + self.o_proj(attended_TNH.flatten(1))
        out: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD), wide)
        return out

    def after_keys(self) -> Iterator[nn.Parameter]:
        """Parameters that shape only this expert's own output, not the keys and values that others attend to."""
        for module in (self.q_proj, self.q_norm, self.o_proj, self.post_attention_layernorm, self.mlp):
            yield from module.parameters()


class MotLayer(nn.Module):
    """One layer: both experts around one joint attention.

    The work before the attention and the work after it are whole functions. `backend`, if set, compiles them; weights
    with one input are then one matrix (generator/joined_products.py).
    """

    def __init__(self, config: MotConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.backend: Compiler | None = None
        self.understanding = Expert(config)
        self.generation = Expert(config)

    def forward(
        self,
        x_UD: Tensor,
        x_GD: Tensor,
        rope: Rope,
        attention: JointAttention,
        num_outputs: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[U, D], [G, D] -> [U, D], [G, D]. Both experts always run, on [0, D] if they have no token: a rank
        that skipped one would leave its gradients unreduced (ZeRO-1/2) or hang the others (ZeRO-3).

        `num_outputs` (last layer, no text loss): only the last `num_outputs` generation tokens are queries; all tokens
        give keys and values. Returns x_UD unchanged, and [num_outputs, D].
        """
        text, latent = experts = (self.understanding, self.generation)
        if num_outputs is not None:
            cos, sin = (table[table.shape[0] - num_outputs :] for table in rope)
            backend = backend_for(self.backend, x_UD, x_GD, *rope, cos, sin)
            qkv = whole(last_heads, backend)(text, latent, x_UD, x_GD, rope, (cos, sin))
            attended_GNH, x_GD = attention(self.index, *qkv), x_GD[x_GD.shape[0] - num_outputs :]
            wide = latent.mlp.wide() if backend_for(backend, attended_GNH, x_GD) else None
            return x_UD, whole(Expert.finish, backend)(latent, x_GD, attended_GNH, wide)
        backend = backend_for(self.backend, x_UD, x_GD, *rope)
        wides = [expert.wide() if backend else None for expert in experts]
        qkv = whole(both_heads, backend)(text, latent, x_UD, x_GD, rope, *wides)
        attended_TNH = attention(self.index, *qkv)
        wides = [expert.mlp.wide() if backend_for(backend, attended_TNH) else None for expert in experts]
        return whole(both_finish, backend)(text, latent, x_UD, x_GD, attended_TNH, *wides)


def both_heads(
    text: Expert,
    latent: Expert,
    x_UD: Tensor,
    x_GD: Tensor,
    rope: Rope,
    wide_text: Tensor | None,
    wide_latent: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, N, H] and k [T, K, H], rotated, and v [T, K, H] of all tokens."""
    q_UNH, k_UKH, v_UKH = text.heads(x_UD, wide_text)
    q_GNH, k_GKH, v_GKH = latent.heads(x_GD, wide_latent)
    v_TKH = torch.cat([v_UKH, v_GKH])
    k_TKH = rotate(torch.cat([k_UKH, k_GKH]), rope, v_TKH.dtype)
    return rotate(torch.cat([q_UNH, q_GNH]), rope, v_TKH.dtype), k_TKH, v_TKH


def both_finish(
    text: Expert,
    latent: Expert,
    x_UD: Tensor,
    x_GD: Tensor,
    attended_TNH: Tensor,
    wide_text: Tensor | None,
    wide_latent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The layer's outputs, [U, D] and [G, D]."""
    num_text = x_UD.shape[0]
    x_UD = text.finish(x_UD, attended_TNH[:num_text], wide_text)
    return x_UD, latent.finish(x_GD, attended_TNH[num_text:], wide_latent)


def last_heads(
    text: Expert, latent: Expert, x_UD: Tensor, x_GD: Tensor, rope: Rope, asking: Rope
) -> tuple[Tensor, Tensor, Tensor]:
    """`both_heads`, with queries of only the last generation tokens, whose rotations `asking` holds."""
    normed_UD, normed_GD = text.input_layernorm(x_UD), latent.input_layernorm(x_GD)
    k_UKH, v_UKH = text.keys_values(normed_UD)
    k_GKH, v_GKH = latent.keys_values(normed_GD)
    v_TKH = torch.cat([v_UKH, v_GKH])
    k_TKH = rotate(torch.cat([k_UKH, k_GKH]), rope, v_TKH.dtype)
    q_GNH = latent.queries(normed_GD[normed_GD.shape[0] - asking[0].shape[0] :])
    return rotate(q_GNH, asking, v_TKH.dtype), k_TKH, v_TKH


class Mot(nn.Module):
    """Text embedding, layers, one final norm per expert."""

    def __init__(self, config: MotConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(MotLayer(config, index) for index in range(config.num_layers))
        self.understanding_norm = RmsNorm(config.width, eps=config.norm_eps)
        self.generation_norm = RmsNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        x_UD: Tensor,
        x_GD: Tensor,
        positions_T: Tensor,
        attention: JointAttention,
        num_outputs: int | None = None,
        text_output: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Embedded tokens [U, D], [G, D] and int64 RoPE positions [T] -> normed outputs [U, D], [num_outputs, D].

        The second output covers the last `num_outputs` generation tokens (None: all). The first output is None unless
        `text_output`: only a text loss reads it. Outputs of the last layer that nothing reads are not computed.
        """
        rope = rope_table(positions_T, self.config.head_dim, self.config.rope_theta)
        last = len(self.layers) - 1
        num_outputs = x_GD.shape[0] if num_outputs is None else num_outputs
        for index, layer in enumerate(self.layers):
            skips = index == last and not text_output
            arguments = (x_UD, x_GD, rope, attention, num_outputs if skips else None)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_UD, x_GD = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_UD, x_GD = layer(*arguments)
        noisy_GD = self.generation_norm(x_GD[x_GD.shape[0] - num_outputs :])
        return self.understanding_norm(x_UD) if text_output else None, noisy_GD

    def compile_layers(self, backend: Compiler = "inductor") -> None:
        """Compiles every layer; see Generator.compile_layers."""
        for layer in self.layers:
            assert isinstance(layer, MotLayer)
            layer.backend = backend

    def text_output_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that `forward(text_output=False)` never reads. Without a text loss they get no gradient and must
        not require one: ZeRO waits for every parameter that does."""
        last = self.layers[-1]
        assert isinstance(last, MotLayer)
        yield from last.understanding.after_keys()
        yield from self.understanding_norm.parameters()


def rope_table(positions_T: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin of p theta^(-2k/H), k < H/2 (Su et al. 2021, eq. 15): two fp32 tensors [T, 1, H/2], computed
    once per batch."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    angles = positions_T.float()[:, None] * theta**-exponents
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x_TNH: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Rotates the pairs (k, k + H/2), as Qwen2 does; computed in fp32, returned in `dtype`."""
    cos, sin = rope
    first, second = x_TNH.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Fills every layer below `module` at random, from `generator` alone.

    Linear: U(-a, a), a = 1 / sqrt(fan_in), which keeps the variance law of nn.Linear at every width and is
    Qwen2's 0.02 at width 896 (std a / sqrt(3) = 0.019); biases 0; norms 1; embeddings N(0, 0.02^2).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(0.0, EMBEDDING_STD, generator=generator)
        elif isinstance(layer, RmsNorm) and layer.elementwise_affine:
            layer.weight.fill_(1.0)


@torch.no_grad()
def init_mimetic(backbone: Mot, generator: torch.Generator) -> None:
    """Starts the generation experts' attention like a trained model's (Trockman and Kolter 2023, section 3).

    A query attends to similar keys, and the attended input is added unchanged. Per head, W_q and W_k are pulled
    towards shared rows B of an orthonormal basis; W_v is B, and B^T is added to W_o. Call it after `init_weights`. A
    small new model then learns in few steps to copy, which editing needs.
    """
    width, head_dim = backbone.config.width, backbone.config.head_dim
    heads_per_key = backbone.config.num_heads // backbone.config.num_kv_heads
    for layer in backbone.layers:
        assert isinstance(layer, MotLayer)
        expert = layer.generation
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        for key_head in range(backbone.config.num_kv_heads):
            first = key_head * head_dim % (width - head_dim + 1)
            shared = basis[first : first + head_dim]
            _rows(expert.k_proj, key_head, head_dim).lerp_(shared, MIMETIC_SHARE)
            _rows(expert.v_proj, key_head, head_dim).copy_(shared)
            for head in range(key_head * heads_per_key, (key_head + 1) * heads_per_key):
                _rows(expert.q_proj, head, head_dim).lerp_(shared, MIMETIC_SHARE)
                out = expert.o_proj.weight[:, head * head_dim : (head + 1) * head_dim]
                out.add_(shared.T, alpha=MIMETIC_OUTPUT / heads_per_key)


def _rows(projection: nn.Linear, head: int, head_dim: int) -> Tensor:
    return projection.weight[head * head_dim : (head + 1) * head_dim]
