"""The pre-norm transformer layer that the bridge and the pixel decoder are built of.

Shapes: B batch, N tokens, D width, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer.norms import LayerNorm


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases and one fused projection (query, key, value)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not divisible by {num_heads} heads"
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        B, N, D = x_BND.shape
        q_BHNK, k_BHNK, v_BHNK = (
            part.view(B, N, self.num_heads, D // self.num_heads).transpose(1, 2)
            for part in self.qkv(x_BND).chunk(3, dim=-1)
        )
        mixed_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.out(mixed_BHNK.transpose(1, 2).reshape(B, N, D))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.down(F.gelu(self.up(x_BND)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width, eps=norm_eps)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x_BND = x_BND + self.attention(self.attention_norm(x_BND))
        return x_BND + self.mlp(self.mlp_norm(x_BND))  # type: ignore[no-any-return]


def run_layers(layers: Iterable[nn.Module], x_BND: Tensor, checkpointing: bool) -> Tensor:
    """Runs the layers in order. With `checkpointing`, training keeps only each layer's input and recomputes the layer
    in every backward pass through it."""
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            x_BND = checkpoint(layer, x_BND, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BND = layer(x_BND)
    return x_BND


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in every Linear (MAE's choice: unit gain at any width)."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
