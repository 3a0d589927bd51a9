"""The objectives of the tokenizer's stages (docs/method.md; base.objective.Objective).

Each micro-batch has adaptive weights of its own. A micro-batch is one pack of one virtual stream, so results do not
depend on the number of ranks.

Shapes: B batch, D feature width, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.objective import LossOutput
from data.samples.images import PixelBatch
from tokenizer import frozen
from tokenizer.bridge import Bridge
from tokenizer.rpiae import Autoencoder
from tokenizer.training import adaptive, losses
from tokenizer.training.objective_base import StageObjective, stage_output
from tokenizer.training.stage_config import StageConfig

PIVOT_EPS, PIVOT_CEILING = 1e-4, 1e5  # eps and ceiling of lambda_piv (docs/method.md)


class PivotObjective(StageObjective):
    """Stage I: E and D on L_rec + w_L L_LPIPS + lambda_piv w_piv L_piv + lambda_gan w_G L_GAN.

    The pivot replica P is a frozen copy of E made here, so that a resumed run, which builds its objective
    before it loads the checkpoint, has the same P; `fingerprints` holds its hash.
    """

    def __init__(
        self, config: StageConfig, autoencoder: Autoencoder, validation_pixels: Tensor | None
    ) -> None:
        self.replica = autoencoder.encoder
        if config.train_encoder:
            self.replica = copy.deepcopy(autoencoder.encoder).requires_grad_(False).eval()
        trained = autoencoder if config.train_encoder else autoencoder.decoder
        super().__init__(config, autoencoder, validation_pixels, trained=(trained,), anchors=(self.replica,))

    @property
    def helpers(self) -> tuple[nn.Module, ...]:
        """Frozen networks beside the model, with the replica unless E is frozen too."""
        replica = (self.replica,) if self.config.train_encoder else ()
        return (*super().helpers, *replica)

    def to(self, device: torch.device) -> None:
        """Moves model, adversary, replica and frozen networks."""
        super().to(device)
        self.replica.to(device)

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """Runs E and D forward once; tokenizer/training/adaptive.py computes the adaptive weights.

        lambda_piv needs d(L_rec + w_L L_LPIPS)/df. Without L_GAN the one backward pass through D gives it. With L_GAN,
        which that gradient leaves out, one more pass through D computes it, without gradients of D's parameters.
        """
        pixels_01, count = batch.pixels_01, self.count(batch)
        balances = self.config.adaptive_pivot and step >= self.config.adaptive_pivot_start_step
        encoder: nn.Module = self.model.encoder
        if not self.config.train_encoder:
            encoder = self._frozen(encoder, pixels_01.device)
        f_BDYX = encoder(pixels_01)
        decoder_input, extra, extra_metrics = self._decoder_input(f_BDYX, batch.seed)
        read_BDYX = self._noisy(decoder_input, batch.seed)
        pixels_hat = self.model.decoder(read_BDYX)
        last_weight = self.model.decoder.last_weight
        terms = self.image_loss.terms(pixels_hat, pixels_01, last_weight, seed=batch.seed, step=step)
        rest, metrics = extra, {**terms.metrics, **extra_metrics}
        read_gradient = None
        if self.config.train_encoder and balances and not terms.is_adversarial:
            read_gradient, image = adaptive.back_once(
                pixels_hat, terms.gradient, read_BDYX, self.model.decoder.parameters()
            )
        else:
            image = (pixels_hat * terms.gradient).sum()
            if self.config.train_encoder and balances:
                read_gradient = adaptive.pull_back(pixels_hat, terms.base_gradient, read_BDYX)
        if self.config.train_encoder:
            frozen.hold_under_autocast(self.replica, pixels_01.device)
            with torch.no_grad():
                pivot_BDYX = self.replica(pixels_01)
            pivot = losses.pivot(f_BDYX, pivot_BDYX, self.config.pivot_loss)
            weight = torch.ones((), device=f_BDYX.device)
            if read_gradient is not None:
                weight = self._pivot_weight(read_BDYX, read_gradient, f_BDYX, pivot)
            rest = rest + self.config.w_pivot * weight * pivot
            metrics |= {
                "pivot": pivot.detach(),
                **adaptive.weight_metrics("lambda_pivot", weight, PIVOT_CEILING),
            }
        mean_loss = adaptive.carry(terms.loss + rest, image + rest)
        return stage_output(mean_loss, metrics, count, terms.adversary_batch)

    def _pivot_weight(
        self, read_BDYX: Tensor, read_gradient: Tensor, f_BDYX: Tensor, pivot: Tensor
    ) -> Tensor:
        """lambda_piv (paper eq. 2), a detached scalar.

        read_gradient: d(L_rec + w_L L_LPIPS) / d read_BDYX, where `read_BDYX` is D's input.
        """
        return adaptive.adaptive_weight(
            f_BDYX,
            self.model.encoder.last_mlp_weight,
            adaptive.pull_back(read_BDYX, read_gradient, f_BDYX),
            adaptive.gradient(pivot, f_BDYX, retain_graph=True),
            eps=PIVOT_EPS,
            ceiling=PIVOT_CEILING,
        )

    def _decoder_input(self, f_BDYX: Tensor, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns D's input before noise, the sum of the losses that stage I lacks, and those losses' metrics."""
        return f_BDYX, torch.zeros((), device=f_BDYX.device), {}


class JointObjective(PivotObjective):
    """The single-stage baseline: E, VB and D trained together on the losses of all stages."""

    def _decoder_input(self, f_BDYX: Tensor, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        f_hat_BDYX, kl = self._through_bridge(f_BDYX, seed)
        feature = F.mse_loss(f_hat_BDYX, f_BDYX)
        metrics = {"feature": feature.detach(), "kl": kl.detach()}
        return f_hat_BDYX, feature + self.config.kl_weight * kl, metrics


class BridgeObjective(StageObjective):
    """Stage II: VB_e and VB_d on mean (f_hat - f)^2 + beta KL + w_rec L_rec; E and D frozen, f clean."""

    def __init__(
        self, config: StageConfig, autoencoder: Autoencoder, validation_pixels: Tensor | None
    ) -> None:
        assert autoencoder.bridge is not None
        super().__init__(
            config,
            autoencoder,
            validation_pixels,
            trained=(autoencoder.bridge,),
            anchors=(autoencoder.encoder, autoencoder.decoder),
        )

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """The gradient of L_rec passes through the frozen D."""
        pixels_01 = batch.pixels_01
        encoder, decoder = (
            self._frozen(part, pixels_01.device) for part in (self.model.encoder, self.model.decoder)
        )
        with torch.no_grad():
            f_BDYX = encoder(pixels_01)
        f_hat_BDYX, kl = self._through_bridge(self._noisy(f_BDYX, batch.seed), batch.seed)
        feature = F.mse_loss(f_hat_BDYX, f_BDYX)
        mean_loss = feature + self.config.kl_weight * kl
        metrics = {"feature": feature.detach(), "kl": kl.detach()}
        if self.config.rec_weight > 0:
            pixels_hat = decoder(f_hat_BDYX)
            rec = losses.reconstruction(pixels_hat, pixels_01)
            mean_loss = mean_loss + self.config.rec_weight * rec
            metrics |= {"rec": rec.detach(), "psnr": losses.psnr_db(pixels_hat.detach(), pixels_01).mean()}
        return stage_output(mean_loss, metrics, self.count(batch), None)


class DecoderObjective(StageObjective):
    """Stage III: D alone on L_rec + w_L L_LPIPS + lambda_gan w_G L_GAN; E and VB frozen, z = mu, no noise."""

    def __init__(
        self, config: StageConfig, autoencoder: Autoencoder, validation_pixels: Tensor | None
    ) -> None:
        assert autoencoder.bridge is not None
        super().__init__(
            config,
            autoencoder,
            validation_pixels,
            trained=(autoencoder.decoder,),
            anchors=(autoencoder.encoder, autoencoder.bridge),
        )

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """D forward once and backward once."""
        pixels_01 = batch.pixels_01
        encoder, bridge = (self._frozen(part, pixels_01.device) for part in (self.model.encoder, self.bridge))
        assert isinstance(bridge, Bridge)
        with torch.no_grad():
            mu_BCYX, _ = bridge.encoder(encoder(pixels_01))
            f_BDYX = bridge.decoder(mu_BCYX)
        pixels_hat = self.model.decoder(f_BDYX)
        last_weight = self.model.decoder.last_weight
        terms = self.image_loss.terms(pixels_hat, pixels_01, last_weight, seed=batch.seed, step=step)
        mean_loss = adaptive.carry(terms.loss, (pixels_hat * terms.gradient).sum())
        return stage_output(mean_loss, terms.metrics, self.count(batch), terms.adversary_batch)
