"""Counts the FLOPs of a training step, and the bytes that it keeps for its backward pass.

The counts cover what the model needs: each token through its own expert, attention over the pairs that the mask
allows, and of the last layer only what is read. A kernel's padding and a checkpointed layer's second run do not count.

The bytes are formulas, not a run on fake tensors as for a tokenizer stage: without a GPU no backward pass runs on fake
CUDA tensors, and norms and attention of a CPU keep other tensors. A test compares them with fake forward passes.

Symbols: U understanding tokens, G generation tokens, N noisy latent tokens, D width, C latent channels.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from data.packs.attention_plan import AttentionPlan
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from generator.embeddings import TIME_FREQUENCIES
from generator.model import LOGIT_ROWS

BACKWARD = 2  # a product's two gradients, each as large as itself
FP32_BYTES = 4


@dataclass(frozen=True)
class PackSize:
    """The numbers that the work of a pack depends on."""

    num_understanding: int  # U
    num_generation: int  # G
    num_noisy: int  # N
    num_images: int
    num_targets: int  # noisy images
    num_predicted: int  # text tokens with a loss
    attended_area: int  # query-key pairs of a layer
    output_area: int  # query-key pairs of the last layer, where only noisy latents are queries
    noisy_area: int  # query-key pairs of the head
    num_keys: int  # rows of keys and values that a layer keeps for its backward pass
    output_keys: int  # rows of keys and values in the last layer, where only noisy latents are queries

    @classmethod
    def of(cls, batch: PackedBatch) -> PackSize:
        """Read from tensor shapes and the plan's lengths, without waiting for a device."""
        assert batch.attention.outputs is not None
        return cls(
            num_understanding=len(batch.text_ids),
            num_generation=len(batch.latents),
            num_noisy=batch.num_loss_tokens,
            num_images=len(batch.image_noisy),
            num_targets=batch.num_targets,
            num_predicted=len(batch.text_loss_ids),
            attended_area=batch.attention.attended_area,
            output_area=batch.attention.outputs.attended_area,
            noisy_area=batch.noisy_attention.attended_area,
            num_keys=_num_keys(batch.attention),
            output_keys=_num_keys(batch.attention.outputs),
        )

    def times(self, num_packs: float) -> PackSize:
        """The size of `num_packs` packs, rounded."""
        return PackSize(*(round(value * num_packs) for value in astuple(self)))


def typical_pack(
    num_tokens: int,
    text_tokens: int,
    grid: tuple[int, int],
    *,
    num_sources: int,
    num_draws: int = 1,
    has_text_loss: bool = False,
) -> PackSize:
    """`num_tokens` of equal samples: `num_sources` clean images of `grid`, a text, `num_draws` noisy images each.

    `has_text_loss`: whether every text is marked for a loss.
    """
    clean, noisy = (ImageSplit(torch.zeros(1, *grid), is_noisy) for is_noisy in (False, True))
    sample = build_packed_batch(
        [[*[clean] * num_sources, TextSplit([0] * text_tokens, has_text_loss), *[noisy] * num_draws]],
        vision_start_id=0,
        vision_end_id=0,
        max_side=max(grid),
        seed=0,
        sample_ids=[""],
    )
    return PackSize.of(sample).times(num_tokens / sample.attention.num_tokens)


def training_flops(size: PackSize, config: GeneratorConfig, channels: int) -> float:
    """FLOPs of the forward and backward pass of one pack."""
    return (1.0 + BACKWARD) * forward_flops(size, config, channels)


def forward_flops(size: PackSize, config: GeneratorConfig, channels: int) -> float:
    """FLOPs of the forward pass of one pack, 2 for a multiply-add."""
    mot = config.backbone
    query_width, kv_width = mot.num_heads * mot.head_dim, mot.num_kv_heads * mot.head_dim
    keys = 2 * mot.width * kv_width
    others = 2 * mot.width * query_width + 3 * mot.width * mot.mlp_width
    num_tokens = size.num_understanding + size.num_generation
    complete = num_tokens * (keys + others) + 2 * size.attended_area * query_width
    skipping = num_tokens * keys + size.num_noisy * others + 2 * size.output_area * query_width
    layers = (mot.num_layers - 1) * complete + (complete if config.text_output else skipping)
    out_width = config.head.width if config.head is not None else mot.width
    ends = (
        _embedding(size.num_generation, size.num_images, channels, mot.width)
        + size.num_noisy * out_width * channels
    )
    if config.text_output:
        ends += size.num_predicted * mot.width * mot.vocab_size
    if config.head is not None:
        ends += _head(size, config.head, mot.width, channels)
    return 2.0 * (layers + ends)


def attention_flops(size: PackSize, config: GeneratorConfig) -> float:
    """The part of `training_flops` for attention's scores and sums, over the pairs that the mask allows."""
    mot = config.backbone
    last = size.attended_area if config.text_output else size.output_area
    pairs = ((mot.num_layers - 1) * size.attended_area + last) * mot.num_heads * mot.head_dim
    if config.head is not None:
        pairs += config.head.num_layers * size.noisy_area * config.head.width
    return (1.0 + BACKWARD) * 2.0 * 2 * pairs


def _head(size: PackSize, head: DdtHeadConfig, backbone_width: int, channels: int) -> int:
    width = head.width
    layer = size.num_noisy * (10 * width * width + 3 * width * head.mlp_width) + 2 * size.noisy_area * width
    return (
        _embedding(size.num_noisy, 2 * size.num_images, channels, width)  # the head embeds time twice
        + size.num_noisy * (backbone_width * width + 2 * width * width)
        + head.num_layers * layer
    )


def _embedding(num_tokens: int, num_images: int, channels: int, width: int) -> int:
    return num_tokens * channels * width + num_images * (TIME_FREQUENCIES * width + width * width)


def activation_bytes(
    size: PackSize, config: GeneratorConfig, channels: int, *, precision: str, checkpointing: bool
) -> int:
    """Peak bytes of a pack on a GPU: tensors saved for the backward pass, and gradients in flight during it.

    `precision`: EngineConfig's. The attention kernel saves q, k, v, its output and the log-sum-exp (flash-attn,
    varlen); SDPA's padding and masks come on top. `checkpointing`: every layer keeps its input, and one layer at a time
    holds all its tensors.
    """
    mot, sizes = config.backbone, _Sizes.of(precision)
    complete, skipping = _layer_bytes(size, mot, sizes), _last_layer_bytes(size, mot, sizes)
    last = complete if config.text_output else skipping
    num_tokens = size.num_understanding + size.num_generation
    if checkpointing:
        kept = mot.num_layers * num_tokens * mot.width * sizes.residual
        layers = kept + (complete if mot.num_layers > 1 else last)
    else:
        layers = (mot.num_layers - 1) * complete + last
    under_way = 2 * sizes.product * mot.mlp_width * max(size.num_understanding, size.num_generation)
    return layers + under_way + _end_bytes(size, config, channels, sizes)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one value. Norms keep the residual's dtype; autocast casts an fp32 input anew for each product."""

    product: int  # inputs and outputs of matrix products and of the attention
    residual: int
    copies_qkv: int  # casts of a normed token, for q, k and v
    copies_mlp: int  # casts of a normed token, for gate and up

    @classmethod
    def of(cls, precision: str) -> _Sizes:
        if precision == "fp32":
            return cls(product=4, residual=4, copies_qkv=1, copies_mlp=1)
        if precision == "bf16":
            return cls(product=2, residual=2, copies_qkv=1, copies_mlp=1)
        return cls(product=2, residual=4, copies_qkv=3, copies_mlp=2)


def _layer_bytes(size: PackSize, mot: MotConfig, sizes: _Sizes) -> int:
    query_width, kv_width = mot.num_heads * mot.head_dim, mot.num_kv_heads * mot.head_dim
    normed = 2 * sizes.residual + (sizes.copies_qkv + sizes.copies_mlp) * sizes.product
    token = mot.width * normed + sizes.product * (
        3 * query_width + 4 * mot.mlp_width
    )  # q, and the output twice
    token += FP32_BYTES * (2 + mot.num_heads)  # statistics of norms and of the softmax
    if mot.qk_norm:
        token += (mot.num_heads + mot.num_kv_heads) * (mot.head_dim * sizes.product + FP32_BYTES)
    num_tokens = size.num_understanding + size.num_generation
    return num_tokens * token + 2 * size.num_keys * kv_width * sizes.product


def _last_layer_bytes(size: PackSize, mot: MotConfig, sizes: _Sizes) -> int:
    """Bytes of the last layer: all tokens give keys and values; only noisy latents need the rest."""
    query_width, kv_width = mot.num_heads * mot.head_dim, mot.num_kv_heads * mot.head_dim
    copies = min(2, sizes.copies_qkv)
    token = mot.width * (sizes.residual + copies * sizes.product) + FP32_BYTES
    noisy = mot.width * (sizes.residual + (sizes.copies_qkv - copies + sizes.copies_mlp) * sizes.product)
    noisy += sizes.product * (2 * query_width + 4 * mot.mlp_width) + FP32_BYTES * (1 + mot.num_heads)
    if mot.qk_norm:
        token += mot.num_kv_heads * (mot.head_dim * sizes.product + FP32_BYTES)
        noisy += mot.num_heads * (mot.head_dim * sizes.product + FP32_BYTES)
    num_tokens = size.num_understanding + size.num_generation
    return num_tokens * token + size.num_noisy * noisy + 2 * size.output_keys * kv_width * sizes.product


def _end_bytes(size: PackSize, config: GeneratorConfig, channels: int, sizes: _Sizes) -> int:
    """Bytes outside the layers: latents, rotary table, final norm, head, velocities; a chunk's logits, their fp32 copy
    and their gradient."""
    mot = config.backbone
    num_tokens = size.num_understanding + size.num_generation
    total = size.num_generation * channels * sizes.product + num_tokens * mot.head_dim * FP32_BYTES
    total += size.num_noisy * (mot.width * (sizes.residual + sizes.product) + channels * FP32_BYTES)
    if config.text_output:
        total += size.num_understanding * mot.width * sizes.residual
        rows = min(size.num_predicted, LOGIT_ROWS)
        total += rows * mot.vocab_size * (sizes.product + 2 * FP32_BYTES)
    if config.head is not None:
        total += size.num_noisy * _head_token_bytes(config.head, channels, sizes)
    return total


def head_kept_bytes(head: DdtHeadConfig, channels: int, precision: str) -> int:
    """Bytes that a DDT head keeps for each noisy token. `precision`: EngineConfig's."""
    return _head_token_bytes(head, channels, _Sizes.of(precision))


def _head_token_bytes(head: DdtHeadConfig, channels: int, sizes: _Sizes) -> int:
    """Bytes of one noisy token in the head. A layer keeps 8 values for both norms (input and output), 1 + scale and the
    products' inputs; q, k and v as one tensor, of which v is a view; q, k, the attention's output and its
    projection, six modulations, the MLP's output; and four wide values in the MLP."""
    layer = (8 + 3 + 11) * head.width * sizes.product + 4 * head.mlp_width * sizes.product
    layer += FP32_BYTES * (2 + 3 * head.num_heads)
    ends = 6 * head.width * sizes.product + channels * sizes.product
    return head.num_layers * layer + ends


def _num_keys(plan: AttentionPlan) -> int:
    """Rows of keys that a layer keeps: copies for the segments; segments that are a range keep a view of all rows."""
    groups = (plan.causal, plan.full)
    copied = sum(len(group.kv_index) for group in groups if group.first_row is None)
    return copied + (plan.full.num_rows if any(group.first_row is not None for group in groups) else 0)
