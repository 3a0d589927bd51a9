"""Aligns an inner layer with the encoder's features during training; the paper has no such loss.

Sources: Yu et al. 2024 (REPA: a projected inner layer is drawn to a frozen encoder's features by their cosine), Singh
et al. 2026 (RAEv2, arXiv 2605.18324: this helps also where the latents are those features). The target is therefore
the clean latent: an RAE's latent is the encoder's features, RPiAE's is what the bridge keeps of them. No features have
to be stored.

Shape suffixes: B images, T tokens, D width, O values of a patch (P * P * C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.bounds import Count, Weight
from base.config import ConfigError
from generator.class_conditional.layers import init_parts, patchify
from generator.class_conditional.model import ClassGenerator


@dataclass(frozen=True)
class AlignConfig:
    """The layer that is aligned, and the strength. Defaults: REPA's for XL."""

    layer: Count = 8
    """Number of the backbone's blocks before the projection."""
    weight: Weight = 0.5
    """Weight of the negative mean cosine, which is added to the mean squared error of velocities."""
    width: Count = 2048
    """Inner width of the projection, which has three matrices with SiLU between them."""

    def __post_init__(self) -> None:
        if self.layer < 1 or self.width < 1 or not 0 < self.weight < math.inf:
            raise ConfigError(
                f"align: layer {self.layer}, weight {self.weight}, width {self.width}; each must be above 0"
            )


class AlignedGenerator(nn.Module):
    """The module that training with alignment optimises: the generator, and a projection that is not exported."""

    def __init__(self, generator: ClassGenerator, config: AlignConfig, seed: int) -> None:
        super().__init__()
        if config.layer > generator.config.num_layers:
            raise ConfigError(
                f"align.layer {config.layer}: the backbone has {generator.config.num_layers} layers"
            )
        self.generator = generator
        self.config = config
        num_values = generator.latents.shape[0] * generator.config.patch**2
        self.projection = nn.Sequential(
            nn.Linear(generator.config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, num_values),
        )
        init_parts(self.projection, torch.Generator().manual_seed(seed), gain=1.0)

    def alignment_loss(self, tokens_BTD: Tensor, z_BCYX: Tensor) -> Tensor:
        """Sum over images of the negative mean cosine between projected tokens and clean latents, fp32 scalar."""
        projected_BTO = self.projection(tokens_BTD).float()
        target_BTO = patchify(z_BCYX, self.generator.config.patch)
        return -F.cosine_similarity(projected_BTO, target_BTO, dim=-1).mean(1).sum()
