"""The smallest tokenizer with every part, and its stage I: a random ViT on 32 px, 4 x 4 tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from data.samples.images import PixelBatch
from helpers.weights import shake
from tokenizer.bridge import BridgeConfig
from tokenizer.pixel_decoder import PixelDecoderConfig
from tokenizer.representation import RepresentationConfig
from tokenizer.rpiae import AutoencoderConfig
from tokenizer.training.build_stage import StageConfig, build_untrained
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.perceptual import PerceptualConfig

VIT = RepresentationConfig(
    name="vit_tiny_patch16_224",
    input_px=32,
    weights="random",
    overrides={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
)
PLAIN = AutoencoderConfig(
    representation=VIT,
    decoder=PixelDecoderConfig(width=64, layers=2, heads=4, mlp_width=128, patch_px=8),
    image_px=32,
)
BRIDGE = BridgeConfig(latent_channels=6, decoder_layers=2, num_heads=4)
WHOLE = dataclasses.replace(PLAIN, bridge=BRIDGE)
PIVOT = StageConfig(
    stage="pivot",
    autoencoder=PLAIN,
    perceptual=PerceptualConfig("representation", representation=VIT, depths=(0, 2)),
    discriminator=DiscriminatorConfig(VIT, depths=(0, 2)),
    adaptive_pivot_start_step=0,
)


def pixel_batch(count: int = 3, seed: int = 5) -> PixelBatch:
    pixels = torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return PixelBatch(pixels, tuple(map(str, range(count))), seed, ({},) * count)


def built(stage: str, config: StageConfig, *, moved: float = 0.02, **changes: Any) -> StageObjective:
    """A stage as after some training: no weight is at its start, and E has left its replica by the deviation `moved`.

    `config`: a pivot stage's, of which the others take the losses.
    """
    config, shapes = dataclasses.replace(config, **changes), None
    if stage == "joint":
        config = dataclasses.replace(config, stage="joint", autoencoder=WHOLE)
    elif stage in ("bridge", "decoder"):
        shapes = PLAIN if stage == "bridge" else WHOLE
        bridge = BRIDGE if stage == "bridge" else None
        config = dataclasses.replace(config, stage=stage, autoencoder=None, init_from="none", bridge=bridge)
    objective = build_untrained(config, starts_from=shapes)
    shake(objective.model, 3, moved)
    if objective.adversary is not None:
        shake(objective.adversary, 4, 0.02)
    return objective
