"""The base class of the tokenizer's stage objectives (base.objective.Objective).

Shapes: B batch, D feature width, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from base.config import to_dict
from base.objective import LossOutput
from data.samples.images import PixelBatch
from tokenizer.blocks import compile_blocks
from tokenizer.bridge import Bridge, sample_latent
from tokenizer.frozen import Twins
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder
from tokenizer.training import health, losses
from tokenizer.training.image_loss import AdversaryBatch, ImageLoss
from tokenizer.training.seeds import Purpose, generator
from tokenizer.training.stage_config import StageConfig
from tokenizer.weights import state_hash

SAMPLE_COLUMNS = 8


class StageObjective:
    """What the stages share. A subclass chooses what is trained and defines `loss`.

    `model` is the whole autoencoder; the parts a stage does not train have requires_grad off. `adversary` is
    the discriminator's heads, or None. `anchors` are the modules that keep their weights from construction on.
    """

    adversary: nn.Module | None

    def __init__(
        self,
        config: StageConfig,
        autoencoder: Autoencoder,
        validation_pixels: Tensor | None,
        *,
        trained: tuple[nn.Module, ...],
        anchors: tuple[nn.Module, ...],
    ) -> None:
        self.name = config.stage
        self.config = config
        self.model = autoencoder
        uses_perceptual = config.stage != "bridge"
        self.image_loss = ImageLoss(config.perceptual, config.w_lpips if uses_perceptual else 0.0, config.gan)
        self.adversary = self.image_loss.heads
        if config.activation_checkpointing:
            self.model.checkpoint_activations()
        self.model.train().requires_grad_(False)  # an exported model comes in evaluation mode
        for module in trained:
            module.requires_grad_(True)
        self._fingerprints = {"initial_weights": state_hash(*anchors), **self.image_loss.fingerprints()}
        self._validation_pixels = validation_pixels
        self._twins = Twins(compiled=config.compile)
        if config.compile:
            self._compile()

    @property
    def bridge(self) -> Bridge:
        """The autoencoder's bridge, in the stages that have one."""
        assert self.model.bridge is not None
        return self.model.bridge

    @property
    def helpers(self) -> tuple[nn.Module, ...]:
        """Frozen networks beside the model."""
        found = (self.image_loss.perceptual, self.image_loss.features)
        return tuple(module for module in found if module is not None)

    def to(self, device: torch.device) -> None:
        """Moves model, adversary and frozen helpers."""
        self.model.to(device)
        self.image_loss.to(device)

    def count(self, batch: PixelBatch) -> int:
        """Images in the micro-batch."""
        return len(batch.sample_ids)

    def further_counts(self, batch: PixelBatch) -> Mapping[str, int]:
        """Empty: every loss is a mean over images, which `count` counts."""
        return {}

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """Defined by each stage."""
        raise NotImplementedError

    def adversary_active(self, step: int) -> bool:
        """Whether the discriminator is trained at this step."""
        return self.image_loss.updates_heads(step)

    def adversary_loss(self, adversary_batch: AdversaryBatch, step: int) -> LossOutput:
        """The discriminator's hinge loss; count: images."""
        return self.image_loss.heads_loss(adversary_batch, step)

    @torch.no_grad()
    def samples(self) -> npt.NDArray[np.uint8] | None:
        """Rows of 8 validation images, each above its reconstruction (z = mu, no noise); uint8 [H, W, 3]."""
        if self._validation_pixels is None:
            return None
        pixels = self._validation_pixels.to(next(self.model.parameters()).device).float() / 255.0
        rows = []
        for originals in torch.split(pixels, SAMPLE_COLUMNS):
            for images in (originals, self.model.decode(self.model.encode(originals))):
                tiles = (images.clamp(0.0, 1.0) * 255.0).round().byte().cpu()
                blank = tiles.new_full((min(SAMPLE_COLUMNS, len(pixels)) - len(tiles), *tiles.shape[1:]), 255)
                rows.append(torch.cat([*tiles, *blank], dim=2))
        return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()

    def export(self, directory: Path) -> None:
        """Writes the autoencoder with this stage's config and fingerprints as provenance."""
        self.model.save(directory, {"stage": to_dict(self.config), "fingerprints": self._fingerprints})

    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of the weights that this run holds fixed, as they were at construction."""
        return self._fingerprints

    def alarms(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """Alarms: a collapsed reconstruction, an adversarial loss out of balance (tokenizer/training/health.py)."""
        return health.alarms(history, self.config.health)

    def describe(self) -> list[str]:
        """What is trained and on which losses, one line each."""
        sizes = {"encoder": self.model.encoder, "bridge": self.model.bridge, "decoder": self.model.decoder}
        parts = [
            f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M"
            + ("" if any(p.requires_grad for p in part.parameters()) else " (frozen)")
            for name, part in sizes.items()
            if part is not None
        ]
        latent = "x".join(map(str, self.model.latent_shape))
        lines = [f"stage {self.name}: {', '.join(parts)}; latent {latent}"]
        if self.config.tau > 0:
            lines.append(f"noise augmentation: tau {self.config.tau}, {self.config.noise_law}")
        return lines + ([] if self.name == "bridge" else self.image_loss.describe())

    def _frozen(self, part: nn.Module, device: torch.device) -> nn.Module:
        """The module that computes for a part of the model that this stage does not train (tokenizer/frozen.py)."""
        return self._twins.of(part, device)

    def _compile(self) -> None:
        """Compiles the blocks of all that the loss runs but E's last one: lambda_piv is measured at its weight."""
        compile_blocks(self.model.encoder, leave=1)
        for part in (self.model.bridge, self.model.decoder, *self.helper_representations()):
            if part is not None:
                compile_blocks(part)

    def helper_representations(self) -> list[Representation]:
        """The frozen vision transformers beside the model."""
        return [
            child
            for helper in self.helpers
            for child in helper.modules()
            if isinstance(child, Representation)
        ]

    def _noisy(self, f_BDYX: Tensor, seed: int) -> Tensor:
        noise = generator(seed, Purpose.FEATURE_NOISE, f_BDYX.device)
        return losses.add_noise(f_BDYX, self.config.tau, self.config.noise_law, noise)

    def _through_bridge(self, f_BDYX: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(f_hat, KL term) with z drawn, or z = mu when sampling is off."""
        mu_BCYX, logvar_BCYX = self.bridge.encoder(f_BDYX)
        z_BCYX = mu_BCYX
        if self.config.sample_latent:
            z_BCYX = sample_latent(mu_BCYX, logvar_BCYX, generator(seed, Purpose.LATENT, mu_BCYX.device))
        return self.bridge.decoder(z_BCYX), losses.kl(mu_BCYX, logvar_BCYX)


def stage_output(
    mean_loss: Tensor, metrics: dict[str, Tensor], count: int, adversary_batch: AdversaryBatch | None
) -> LossOutput:
    """Turns means over the micro-batch into the sums that the loop divides by the global count."""
    sums = {name: value.float() * count for name, value in metrics.items()}
    return LossOutput(mean_loss.float() * count, sums, adversary_batch)
