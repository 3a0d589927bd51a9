"""Losses on decoded images, shared by the pivot, decoder and joint stages: L1, perceptual, adversarial.

Shapes: B batch, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from base.objective import LossOutput
from tokenizer.frozen import hold_under_autocast
from tokenizer.training import adaptive, losses
from tokenizer.training.diffaug import augment
from tokenizer.training.discriminator import FrozenFeatures, Heads, frozen_logits
from tokenizer.training.perceptual import Perceptual, build_perceptual
from tokenizer.training.seeds import Purpose, generator
from tokenizer.training.stage_config import GanConfig, PerceptualConfig
from tokenizer.weights import state_hash

GAN_EPS, GAN_CEILING = 1e-6, 1e4  # eps and ceiling of lambda_gan (docs/method.md)


@dataclass(frozen=True)
class AdversaryBatch:
    """Images for the discriminator's update: detached, in [0, 1], fp32 [B, 3, H, W]; fakes have 8 bits."""

    real_01: Tensor
    fake_01: Tensor
    seed: int


@dataclass(frozen=True)
class ImageTerms:
    """The image losses of one micro-batch, differentiated once, at x_hat.

    `loss`: detached scalar, the weighted sum as a mean over images. `base_gradient`: d(L_rec + w_L L_LPIPS)/dx_hat;
    `gradient`: d loss / dx_hat with lambda_gan held constant; both [B, 3, H, W]. `metrics`: detached scalars, means
    over images. `adversary_batch`: images for the discriminator's update, None while it is not trained.
    """

    loss: Tensor
    base_gradient: Tensor
    gradient: Tensor
    metrics: dict[str, Tensor]
    adversary_batch: AdversaryBatch | None

    @property
    def is_adversarial(self) -> bool:
        """Whether L_GAN is part of the loss; otherwise `base_gradient` is `gradient`."""
        return self.base_gradient is not self.gradient


class ImageLoss:
    """L_rec + w_L L_LPIPS + lambda_gan w_G L_GAN, with the losses' frozen networks and the trainable heads."""

    def __init__(self, perceptual: PerceptualConfig, perceptual_weight: float, gan: GanConfig | None) -> None:
        self.gan = gan
        self.perceptual_weight = perceptual_weight
        self.perceptual: Perceptual | None = build_perceptual(perceptual) if perceptual_weight > 0 else None
        self.features: FrozenFeatures | None = None
        self.heads: Heads | None = None
        if gan is not None:
            self.features = FrozenFeatures(gan.discriminator)
            self.heads = Heads(self.features.representation.width, gan.discriminator)

    def to(self, device: torch.device) -> None:
        """Moves the frozen networks and the heads."""
        for module in (self.perceptual, self.features, self.heads):
            if module is not None:
                module.to(device)

    def describe(self) -> list[str]:
        """The losses and networks in use, one line each."""
        lines = ["no perceptual loss" if self.perceptual is None else self.perceptual.describe()]
        if self.gan is None:
            return [*lines, "no adversarial loss"]
        discriminator = self.gan.discriminator
        return [
            *lines,
            f"adversarial loss: heads on frozen {discriminator.representation.name} at depths "
            f"{list(discriminator.depths)}, trained from step {self.gan.update_start_step}, "
            f"in the loss from step {self.gan.loss_start_step}",
        ]

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the frozen networks, by role."""
        frozen: dict[str, nn.Module | None] = {"perceptual": self.perceptual, "discriminator": self.features}
        return {name: state_hash(module) for name, module in frozen.items() if module is not None}

    def terms(
        self, pixels_hat: Tensor, pixels_01: Tensor, last_weight: Tensor, *, seed: int, step: int
    ) -> ImageTerms:
        """Differentiates the losses at x_hat, cut from the decoder's graph.

        pixels_hat: [B, 3, H, W] fp32 with the decoder's graph, whose last layer has the parameter
        `last_weight`.
        """
        self._hold(pixels_hat.device)
        leaf = pixels_hat.detach().requires_grad_()
        l1 = losses.reconstruction(leaf, pixels_01)
        loss = l1
        metrics = {"rec": l1.detach(), "psnr": losses.psnr_db(leaf.detach(), pixels_01).mean()}
        if self.perceptual is not None:
            distance = self.perceptual(leaf, self.perceptual.reference(pixels_01)).mean()
            loss = loss + self.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        base_gradient = adaptive.gradient(loss, leaf)
        loss, gradient = loss.detach(), base_gradient
        if self.gan is not None and step >= self.gan.loss_start_step:
            gan_loss = losses.generator_hinge(self._logits_for_decoder(leaf, seed, step))
            gan_gradient = adaptive.gradient(gan_loss, leaf)
            weight = adaptive.adaptive_weight(
                pixels_hat, last_weight, base_gradient, gan_gradient, eps=GAN_EPS, ceiling=GAN_CEILING
            )
            loss = loss + self.gan.weight * weight * gan_loss.detach()
            gradient = base_gradient + self.gan.weight * weight * gan_gradient
            metrics |= {
                "gan": gan_loss.detach(),
                **adaptive.weight_metrics("lambda_gan", weight, GAN_CEILING),
            }
        fake = losses.quantise(leaf.detach())
        adversary_batch = AdversaryBatch(pixels_01, fake, seed) if self.updates_heads(step) else None
        return ImageTerms(loss, base_gradient, gradient, metrics, adversary_batch)

    def updates_heads(self, step: int) -> bool:
        """Whether the discriminator is trained at this step."""
        return self.gan is not None and step >= self.gan.update_start_step

    def heads_loss(self, batch: AdversaryBatch, step: int) -> LossOutput:
        """Hinge loss of the discriminator on augmented originals and 8-bit reconstructions."""
        assert self.features is not None and self.heads is not None
        self._hold(batch.real_01.device)
        self.heads.begin_step(step)
        with torch.no_grad():
            real = self.features(self._augmented(batch.real_01, batch.seed, Purpose.AUGMENT_REAL))
            fake = self.features(self._augmented(batch.fake_01, batch.seed, Purpose.AUGMENT_FAKE))
        logits_real, logits_fake = self.heads(real), self.heads(fake)
        loss = losses.discriminator_hinge(logits_real, logits_fake)
        metrics = {
            "accuracy_real": (logits_real > 0).float().mean(),
            "accuracy_fake": (logits_fake < 0).float().mean(),
        }
        count = len(batch.real_01)
        return LossOutput(loss * count, {name: value * count for name, value in metrics.items()})

    def _hold(self, device: torch.device) -> None:
        for network in (self.perceptual, self.features):
            if network is not None:
                hold_under_autocast(network, device)

    def _logits_for_decoder(self, pixels: Tensor, seed: int, step: int) -> Tensor:
        assert self.features is not None and self.heads is not None
        self.heads.begin_step(step)
        levels = self.features(self._augmented(pixels, seed, Purpose.AUGMENT_GENERATOR))
        return frozen_logits(self.heads, levels)

    @staticmethod
    def _augmented(pixels_01: Tensor, seed: int, purpose: Purpose) -> Tensor:
        return augment(pixels_01, generator(seed, purpose, pixels_01.device))
