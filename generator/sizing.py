"""How much work a training step is: floating-point operations of the matrix products it asks for.

Counted is what the model needs: each token through its own expert, attention over the pairs that the mask allows, and
of the last layer what is read (design contract 5). What a kernel pads, or a checkpointed layer computes again, is not.

Symbols: U understanding tokens, G generation tokens, N noisy latent tokens, D width, C latent channels.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from data.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from generator.embeddings import TIME_FREQUENCIES
from generator.heads import DdtHeadConfig
from generator.model import GeneratorConfig

BACKWARD = 2  # a product's two gradients, each as large as itself


@dataclass(frozen=True)
class PackSize:
    """What the work of a pack depends on."""

    num_understanding: int  # U
    num_generation: int  # G
    num_noisy: int  # N
    num_images: int
    num_predicted: int  # text tokens with a loss
    attended_area: int  # query-key pairs of a layer
    output_area: int  # of the last layer, where noisy latents alone ask
    noisy_area: int  # of the head

    @classmethod
    def of(cls, batch: PackedBatch) -> PackSize:
        """Read from tensor shapes and the plan's lengths: no device is asked."""
        assert batch.attention.outputs is not None
        return cls(
            num_understanding=len(batch.text_ids),
            num_generation=len(batch.latents),
            num_noisy=batch.num_loss_tokens,
            num_images=len(batch.image_noisy),
            num_predicted=len(batch.text_loss_ids),
            attended_area=batch.attention.attended_area,
            output_area=batch.attention.outputs.attended_area,
            noisy_area=batch.noisy_attention.attended_area,
        )

    def times(self, num_packs: float) -> PackSize:
        """So many packs, rounded."""
        return PackSize(*(round(value * num_packs) for value in astuple(self)))


def typical_pack(num_tokens: int, text_tokens: int, grid: tuple[int, int], *, num_sources: int) -> PackSize:
    """`num_tokens` of equal samples: `text_tokens`, a noisy image of `grid` and before them so many clean ones."""
    clean, noisy = (ImageSplit(torch.zeros(1, *grid), is_noisy) for is_noisy in (False, True))
    sample = build_packed_batch(
        [[*[clean] * num_sources, TextSplit([0] * text_tokens), noisy]],
        vision_start_id=0,
        vision_end_id=0,
        max_side=max(grid),
        seed=0,
        sample_ids=[""],
    )
    return PackSize.of(sample).times(num_tokens / sample.attention.num_tokens)


def training_flops(size: PackSize, config: GeneratorConfig, channels: int) -> float:
    """Forward and backward pass of one pack."""
    return (1.0 + BACKWARD) * forward_flops(size, config, channels)


def forward_flops(size: PackSize, config: GeneratorConfig, channels: int) -> float:
    """2 FLOPs a multiply-add."""
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


def _head(size: PackSize, head: DdtHeadConfig, backbone_width: int, channels: int) -> int:
    width = head.width
    layer = size.num_noisy * (10 * width * width + 3 * width * head.mlp_width) + 2 * size.noisy_area * width
    return (
        _embedding(
            size.num_noisy, 2 * size.num_images, channels, width
        )  # its time embedding is asked for twice
        + size.num_noisy * (backbone_width * width + 2 * width * width)
        + head.num_layers * layer
    )


def _embedding(num_tokens: int, num_images: int, channels: int, width: int) -> int:
    return num_tokens * channels * width + num_images * (TIME_FREQUENCIES * width + width * width)
