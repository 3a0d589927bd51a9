"""Counts the FLOPs of a class-conditional training step, and the bytes that it keeps for its backward pass.

Symbols: B images, T tokens of an image, D width, W head width, C latent channels, P patch side.
"""

from __future__ import annotations

from dataclasses import dataclass

from generator.class_conditional.config import AlignConfig, DitConfig, mlp_width
from generator.class_conditional.layers import TIME_FREQUENCIES
from generator.sizing import BACKWARD, FP32_BYTES

LATENTS = 6
"""Tensors as large as the batch's latents in the loss: clean, noise, noisy, velocity, target, difference."""


def training_flops(
    config: DitConfig, shape: tuple[int, int, int], num_images: int, align: AlignConfig | None = None
) -> float:
    """FLOPs of the forward and backward pass of `num_images`; `shape`: C, Y, X of their latents."""
    work = forward_flops(config, shape, num_images)
    if align is not None:
        tokens, inner = num_images * num_tokens(config, shape), align.width
        work += 2.0 * tokens * inner * (config.width + inner + shape[0] * config.patch**2)
    return (1.0 + BACKWARD) * work


def forward_flops(config: DitConfig, shape: tuple[int, int, int], num_images: int) -> float:
    """FLOPs of the forward pass, 2 for a multiply-add. Modulations run once an image, in a head once a token."""
    tokens, patch_values = num_tokens(config, shape), shape[0] * config.patch**2
    width, head = config.width, config.head
    work = 2 * TIME_FREQUENCIES * width + width * width  # the time embedding of one image
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
    """Tokens of one image."""
    return (shape[1] // config.patch) * (shape[2] // config.patch)


def _block(tokens: int, width: int, num_conditions: int) -> int:
    """Multiply-adds of one block for one image: q, k, v, out; scores and sums; MLP; modulations."""
    products = tokens * (4 * width**2 + 3 * width * mlp_width(width))
    return products + 2 * tokens * tokens * width + num_conditions * 6 * width**2


def activation_bytes(
    config: DitConfig,
    shape: tuple[int, int, int],
    num_images: int,
    *,
    precision: str,
    checkpointing: bool,
    num_weights: int,
    align: AlignConfig | None = None,
) -> int:
    """Peak bytes of a batch on a GPU, in tensors that a fused attention and the other layers save.

    The peak is at the end of the forward pass or at the start of the backward pass. `precision`: EngineConfig's.
    `checkpointing`: every block keeps its input, and one block at a time holds all its tensors. `num_weights`: fp32
    weights of which autocast keeps bf16 copies until the backward pass; with `checkpointing`, until the forward pass or
    one block is done.
    """
    tokens, product = num_images * num_tokens(config, shape), FP32_BYTES if precision == "fp32" else 2
    is_cast, values = precision == "bf16_autocast", shape[0] * config.patch**2
    stacks = [_Stack(config.width, config.num_heads, config.num_layers, is_head=False)]
    if config.head is not None:
        head = config.head
        stacks.append(_Stack(head.width, head.num_heads, head.num_layers, is_head=True))
    behind = _end_bytes(config, is_cast, product) + values * (LATENTS * FP32_BYTES + _cast_bytes(product))
    if align is not None:
        behind += _alignment_bytes(config, align, values, product)
    under_way = _under_way_bytes(config, is_cast, product) + values * (FP32_BYTES + product)
    forward, again = tokens * behind + 2 * num_weights * is_cast, tokens * under_way
    whole = [tokens * stack.token_bytes(config.qk_norm, is_cast, product) for stack in stacks]
    if not checkpointing:
        blocks = sum(block * stack.num_layers for block, stack in zip(whole, stacks, strict=True))
        return blocks + max(forward, again + 2 * num_weights * is_cast)
    blocks = tokens * sum(stack.input_bytes(is_cast, product) * stack.num_layers for stack in stacks)
    largest = max(block + 2 * stack.num_weights * is_cast for block, stack in zip(whole, stacks, strict=True))
    return blocks + max(forward, largest + again)


@dataclass(frozen=True)
class _Stack:
    """Blocks of one width."""

    width: int
    num_heads: int
    num_layers: int
    is_head: bool

    @property
    def num_weights(self) -> int:
        """Weights of one block: q, k, v, out; modulations; MLP."""
        return 10 * self.width**2 + 3 * self.width * mlp_width(self.width)

    def input_bytes(self, is_cast: bool, product: int) -> int:
        """Bytes of one token at a block's input: fp32 under autocast, as its positions are. A head adds none."""
        return self.width * (FP32_BYTES if is_cast and not self.is_head else product)

    def token_bytes(self, qk_norm: bool, is_cast: bool, product: int) -> int:
        """Bytes of one token in one block.

        Attention and MLP each keep the stream before the norm, the normed values that the scale multiplies, the
        product's input and the gated output. Attention also keeps q, k and v as one tensor, q and k rotated, the output
        twice and the log-sum-exp. The stream and the normed values have one dtype. The MLP also keeps two wide values,
        silu of the first, and the product of the two. A head keeps for every token silu of the condition, six
        modulations, and 1 + scale twice.
        """
        width = self.width
        total = 2 * (2 * self.input_bytes(is_cast, product) + 2 * width * product) + 2 * FP32_BYTES
        total += 7 * width * product + FP32_BYTES * self.num_heads
        if qk_norm:
            total += 2 * self.num_heads * FP32_BYTES
        total += 4 * mlp_width(width) * product
        return total + (9 * width * product if self.is_head else 0)


def _end_bytes(config: DitConfig, is_cast: bool, product: int) -> int:
    """Bytes of one token after the blocks: last norm, input of the last product; a head's condition, modulations."""
    width, stream = config.width, FP32_BYTES if is_cast else product
    if config.head is None:
        return width * (2 * stream + product)
    return config.head.width * 7 * product + width * (stream + product)


def _under_way_bytes(config: DitConfig, is_cast: bool, product: int) -> int:
    """Bytes of one token's gradients in flight: stream, the last MLP's wide values, a head's condition and its copy."""
    width = config.width if config.head is None else config.head.width
    total = 2 * width * (FP32_BYTES if is_cast else product) + mlp_width(width) * product
    return total if config.head is None else total + 2 * width * product


def _alignment_bytes(config: DitConfig, align: AlignConfig, values: int, product: int) -> int:
    """Bytes of one token: the projection's input, both inner layers before and after SiLU, its output and the patch
    compared with it, in fp32."""
    total = (config.width + values) * _cast_bytes(product)
    return total + 4 * align.width * product + 2 * values * FP32_BYTES


def _cast_bytes(product: int) -> int:
    """Bytes of the copy of an fp32 value that enters a product in bf16; 0 without a cast."""
    return product if product < FP32_BYTES else 0
