"""Stage I's loss with adaptive weights computed the plain way: one full backward pass for each gradient norm.

The slow reference of `PivotObjective.loss` (objectives.py), for the tests and benchmarks/adaptive_weights.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from data.samples.images import PixelBatch
from tokenizer.bridge import sample_latent
from tokenizer.training import losses
from tokenizer.training.diffaug import augment
from tokenizer.training.image_loss import GAN_CEILING, GAN_EPS
from tokenizer.training.objectives import PIVOT_CEILING, PIVOT_EPS, PivotObjective
from tokenizer.training.seeds import Purpose, generator


def plain_mean_loss(objective: PivotObjective, batch: PixelBatch, step: int) -> Tensor:
    """The mean loss of a micro-batch (docs/method.md, stage I and the baseline) with a graph through every network.

    The perceptual loss must be on. The adversarial loss is on from its start step. `objective.loss` must give equal
    gradients.
    """
    config, model, image_loss = objective.config, objective.model, objective.image_loss
    assert image_loss.perceptual is not None
    pixels_01 = batch.pixels_01
    device = pixels_01.device
    f = model.features(pixels_01)
    decoder_input, extra = f, torch.zeros((), device=device)
    if model.bridge is not None:
        mu, logvar = model.bridge.encoder(f)
        z = sample_latent(mu, logvar, generator(batch.seed, Purpose.LATENT, device))
        decoder_input = model.bridge.decoder(z)
        extra = F.mse_loss(decoder_input, f) + config.kl_weight * losses.kl(mu, logvar)
    noise = generator(batch.seed, Purpose.FEATURE_NOISE, device)
    pixels_hat = model.decoder(losses.add_noise(decoder_input, config.tau, config.noise_law, noise))
    distance = image_loss.perceptual(pixels_hat, image_loss.perceptual.reference(pixels_01)).mean()
    base = (pixels_hat - pixels_01).abs().mean() + config.w_lpips * distance
    with torch.no_grad():
        f_pivot = objective.replica(pixels_01)
    pivot = (f - f_pivot).square().mean()

    def norm(loss: Tensor, weight: Tensor) -> Tensor:
        length: Tensor = torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()
        return length

    last, mlp = model.decoder.last_weight, model.encoder.last_mlp_weight
    lambda_pivot = (norm(base, mlp) / (norm(pivot, mlp) + PIVOT_EPS)).clamp(max=PIVOT_CEILING)
    mean_loss: Tensor = base + config.w_pivot * lambda_pivot * pivot + extra
    if image_loss.gan is None or step < image_loss.gan.loss_start_step:
        return mean_loss
    assert image_loss.heads is not None and image_loss.features is not None
    image_loss.heads.begin_step(step)
    augmented = augment(pixels_hat, generator(batch.seed, Purpose.AUGMENT_GENERATOR, device))
    gan = -image_loss.heads(image_loss.features(augmented)).mean()
    lambda_gan = (norm(base, last) / (norm(gan, last) + GAN_EPS)).clamp(max=GAN_CEILING)
    mean_loss = mean_loss + config.w_gan * lambda_gan * gan
    return mean_loss
