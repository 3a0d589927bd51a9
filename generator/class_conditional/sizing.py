"""How much work a class-conditional training step is, and what it keeps for its backward pass.

Symbols: B images, T tokens of an image, D width, W head width, C latent channels, P patch side.
"""

from __future__ import annotations

from generator.class_conditional.config import DitConfig, mlp_width
from generator.class_conditional.layers import TIME_FREQUENCIES
from generator.sizing import BACKWARD, FP32_BYTES


def training_flops(config: DitConfig, shape: tuple[int, int, int], num_images: int) -> float:
    """Forward and backward pass of so many images; `shape`: of their latents, C, Y, X."""
    return (1.0 + BACKWARD) * forward_flops(config, shape, num_images)


def forward_flops(config: DitConfig, shape: tuple[int, int, int], num_images: int) -> float:
    """2 FLOPs a multiply-add. Modulations are asked for once an image, in a head once a token."""
    tokens, patch_values = num_tokens(config, shape), shape[0] * config.patch**2
    width, head = config.width, config.head
    work = 2 * TIME_FREQUENCIES * width + width * width  # of an image: its time
    work += config.num_layers * _block(tokens, width, num_conditions=1) + tokens * patch_values * width
    out_width, out_conditions = width, 1
    if head is not None:
        out_width, out_conditions = head.width, tokens
        if head.width != width:
            work += tokens * width * head.width
        work += tokens * patch_values * head.width
        work += head.num_layers * _block(tokens, head.width, num_conditions=tokens)
    work += out_conditions * 2 * out_width**2 + tokens * out_width * patch_values
    return 2.0 * num_images * work


def num_tokens(config: DitConfig, shape: tuple[int, int, int]) -> int:
    """Of one image."""
    return (shape[1] // config.patch) * (shape[2] // config.patch)


def _block(tokens: int, width: int, num_conditions: int) -> int:
    """Multiply-adds of one image: q, k, v, out; scores and sums; MLP; modulations."""
    products = tokens * (4 * width**2 + 3 * width * mlp_width(width))
    return products + 2 * tokens * tokens * width + num_conditions * 6 * width**2


def activation_bytes(
    config: DitConfig, shape: tuple[int, int, int], num_images: int, *, precision: str, checkpointing: bool
) -> int:
    """What a batch holds on a GPU at its fullest, in tensors that a fused attention and the other layers save.

    `checkpointing`: every block keeps its input, one block is there as a whole.
    """
    tokens, product = num_images * num_tokens(config, shape), FP32_BYTES if precision == "fp32" else 2
    head = config.head
    stacks = [(config.width, config.num_heads, config.num_layers, False)]
    if head is not None:
        stacks.append((head.width, head.num_heads, head.num_layers, True))
    whole = [
        (_block_bytes(width, heads, config.qk_norm, product, per_token), width, layers)
        for width, heads, layers, per_token in stacks
    ]
    layers = sum(block * layers for block, _, layers in whole)
    if checkpointing:
        kept = sum(FP32_BYTES * width * layers for _, width, layers in whole)
        layers = kept + max(block for block, _, _ in whole)
    return tokens * (layers + _end_bytes(config, product))


def _block_bytes(width: int, num_heads: int, qk_norm: bool, product: int, per_token: bool) -> int:
    """Of one token in one block.

    Twice, for attention and MLP: the stream before its norm, the normed values that the scale multiplies, what enters
    the product, the gated output. Attention: q, k and v as one tensor, q and k turned, the output twice, the
    log-sum-exp; under autocast q and k once more for their norms. MLP: two wide values, silu of the first, their
    product. `per_token`: silu of the condition, six modulations, and 1 + scale twice, of every token.
    """
    total = 2 * width * (2 * FP32_BYTES + 2 * product) + 2 * FP32_BYTES
    total += 7 * width * product + FP32_BYTES * num_heads
    if qk_norm:
        total += 2 * num_heads * FP32_BYTES + (2 * width * FP32_BYTES if product < FP32_BYTES else 0)
    total += 4 * mlp_width(width) * product
    if per_token:
        total += 9 * width * product
    return total


def _end_bytes(config: DitConfig, product: int) -> int:
    """Of one token: the last norm and what it enters; a head's condition, and the modulations behind it."""
    width = config.width
    if config.head is None:
        return width * (2 * FP32_BYTES + product)
    return config.head.width * (2 * FP32_BYTES + 5 * product) + width * (FP32_BYTES + product)
