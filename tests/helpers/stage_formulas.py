"""The losses of docs/method.md on `helpers.stages.pixel_batch()`, with plain autograd through every network.

Nothing of tokenizer/training/ computes here: noise, latents, augmentation, distances and adaptive weights are made from
their equations, and random streams from their seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.stages import pixel_batch
from tokenizer.bridge import Bridge
from tokenizer.representation import Representation
from tokenizer.training.discriminator import Head
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.objectives import PivotObjective
from tokenizer.training.perceptual import RepresentationDistance

SEED = 5  # pixel_batch's
# The numbers of tokenizer/training/seeds.py, which are part of every run's results.
FEATURE_NOISE, LATENT, AUGMENT_GENERATOR, AUGMENT_REAL, AUGMENT_FAKE = range(5)


def stream(purpose: int) -> torch.Generator:
    """The stream of the batch's seed for one purpose: 63 bits of numpy's mixture of the two."""
    (mixed,) = np.random.SeedSequence((SEED, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) // 2)


def plain_augment(pixels_01: Tensor, purpose: int) -> Tensor:
    """DiffAugment's colour and translation (Zhao et al. 2020), image by image, on pixels in [-1, 1].

    Brightness: + U(-1/2, 1/2). Saturation: x - grey times U(0, 2), grey the mean over channels. Contrast: x - mean
    times U(1/2, 3/2), the mean over the image. Translation: by up to an eighth of a side either way, filled with 0.
    """
    generator = stream(purpose)
    colour = torch.rand(3, len(pixels_01), generator=generator)
    moves = torch.rand(len(pixels_01), 2, generator=generator)
    images = []
    for x, (brightness, saturation, contrast), move in zip(2 * pixels_01 - 1, colour.T, moves, strict=True):
        x = x + (brightness - 0.5)
        grey = (x[0] + x[1] + x[2]) / 3
        x = torch.stack([grey + 2 * saturation * (channel - grey) for channel in x])
        mean = x.sum() / x.numel()
        x = mean + (0.5 + contrast) * (x - mean)
        limits = [side // 8 for side in x.shape[1:]]
        down, right = (
            math.floor(float(u) * (2 * limit + 1)) - limit for u, limit in zip(move, limits, strict=True)
        )
        padded = F.pad(x, (limits[1], limits[1], limits[0], limits[0]))
        top, left = limits[0] - down, limits[1] - right
        images.append((padded[:, top : top + x.shape[1], left : left + x.shape[2]] + 1) / 2)
    return torch.stack(images)


def plain_features(network: Representation, pixels_01: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """What the discriminator reads: patch tokens plus the class token, [B, D, N] of each depth."""
    return [
        (patches + prefix[:, :1]).transpose(1, 2)
        for patches, prefix in network.intermediates(pixels_01, depths)
    ]


def plain_convolution(weight: Tensor, bias: Tensor, left: Tensor, x: Tensor) -> Tensor:
    """Circular convolution with the weight over its largest singular value, estimated by the vector `left`."""
    rows = weight.flatten(1)
    right = (left @ rows).detach()
    right = right / right.norm()
    weight = weight / (left @ rows @ right)
    half = weight.shape[2] // 2
    wrapped = torch.cat([x[..., x.shape[2] - half :], x, x[..., :half]], dim=2)
    windows = wrapped.unfold(2, weight.shape[2], 1)  # [B, in, N, K]
    return torch.einsum("oik,bink->bon", weight, windows) + bias[:, None]


def plain_head(head: Head, x: Tensor) -> Tensor:
    """Logits [B, N]: leaky(GN(conv 1)), leaky(GN(conv K)) added over sqrt 2, conv 1."""

    def convolve(name: str, x: Tensor) -> Tensor:
        layer = getattr(head, name)
        return plain_convolution(layer.weight, layer.bias, layer.left, x)

    def norm(name: str, x: Tensor) -> Tensor:
        layer, mean = getattr(head, name), x.mean((1, 2), keepdim=True)
        scaled = (x - mean) / ((x - mean).square().mean((1, 2), keepdim=True) + 1e-5).sqrt()
        return scaled * layer.weight[:, None] + layer.bias[:, None]

    def leaky(x: Tensor) -> Tensor:
        return torch.maximum(x, 0.2 * x)

    with torch.autocast("cpu", enabled=False):
        x = leaky(norm("first_norm", convolve("first", x.float())))
        x = (x + leaky(norm("second_norm", convolve("second", x)))) / math.sqrt(2)
        return convolve("logit", x)[:, 0]


def plain_logits(objective: StageObjective, pixels_01: Tensor) -> Tensor:
    loss = objective.image_loss
    assert loss.heads is not None and loss.features is not None
    levels = plain_features(loss.features.representation, pixels_01, loss.features.depths)
    return torch.cat([plain_head(head, x) for head, x in zip(loss.heads.heads, levels, strict=True)], dim=1)


def plain_distance(network: Representation, depths: Sequence[int], a: Tensor, b: Tensor) -> Tensor:
    """Mean over images, depths and tokens of the squared distance of unit-length patch tokens."""
    levels = []
    for (x, _), (y, _) in zip(
        network.intermediates(a, depths), network.intermediates(b, depths), strict=True
    ):
        x, y = (tokens / tokens.square().sum(2, keepdim=True).sqrt() for tokens in (x, y))
        levels.append((x - y).square().sum(2).mean())
    return sum(levels[1:], levels[0]) / len(levels)


def plain_noisy(f: Tensor, tau: float, law: str) -> Tensor:
    """f + s eps: s = |N(0, tau^2)| (paper) or tau U(0, 1) (release), one for each sample."""
    if tau == 0:
        return f
    generator = stream(FEATURE_NOISE)
    draw = {"gaussian": torch.randn, "uniform": torch.rand}[law](len(f), 1, 1, 1, generator=generator)
    return f + tau * draw.abs() * torch.randn(f.shape, generator=generator)


def plain_bridge(bridge: Bridge, f: Tensor, *, draws: bool) -> tuple[Tensor, Tensor]:
    """f_hat and mean (mu^2 + sigma^2 - 1 - log sigma^2)."""
    mu, logvar = bridge.encoder(f)
    sigma = (logvar / 2).exp()
    z = mu + sigma * torch.randn(mu.shape, generator=stream(LATENT)) if draws else mu
    return bridge.decoder(z), (mu**2 + sigma**2 - 1 - 2 * sigma.log()).mean()


def gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss, weight, retain_graph=True)[0].square().sum().sqrt()


def plain_loss(objective: StageObjective, step: int) -> Tensor:
    """The mean loss of docs/method.md with a graph through every network; a backward pass for each adaptive weight."""
    config, model, x = objective.config, objective.model, pixel_batch().pixels_01
    tau = (
        {"pivot": 0.8, "joint": 0.8}.get(config.stage, 0.0) if config.noise_tau is None else config.noise_tau
    )
    trains_encoder = config.stage in ("pivot", "joint") and config.train_encoder
    f = model.encoder(x) if trains_encoder else model.encoder(x).detach()
    extra = torch.zeros(())
    if config.stage == "bridge":
        f_hat, kl = plain_bridge(
            objective.bridge, plain_noisy(f, tau, config.noise_law), draws=config.sample_latent
        )
        rec = (model.decoder(f_hat) - x).abs().mean()
        return (f_hat - f).square().mean() + config.kl_weight * kl + config.rec_weight * rec
    if config.stage == "decoder":
        read = objective.bridge.decoder(objective.bridge.encoder(f)[0]).detach()
    elif config.stage == "joint":
        f_hat, kl = plain_bridge(objective.bridge, f, draws=config.sample_latent)
        extra = (f_hat - f).square().mean() + config.kl_weight * kl
        read = plain_noisy(f_hat, tau, config.noise_law)
    else:
        read = plain_noisy(f, tau, config.noise_law)
    x_hat = model.decoder(read)
    base = (x_hat - x).abs().mean()
    if config.w_lpips:
        perceptual = objective.image_loss.perceptual
        assert isinstance(perceptual, RepresentationDistance)
        base = base + config.w_lpips * plain_distance(perceptual.representation, perceptual.depths, x_hat, x)
    total = base + extra
    if trains_encoder:
        assert isinstance(objective, PivotObjective)
        f_pivot = objective.replica(x)
        if config.pivot_loss == "normalised":
            f, f_pivot = (part / part.square().sum(1, keepdim=True).sqrt() for part in (f, f_pivot))
        pivot = (f - f_pivot).square().mean()
        weight = torch.ones(())
        if config.adaptive_pivot and step >= config.adaptive_pivot_start_step:
            mlp = model.encoder.last_mlp_weight
            weight = gradient_norm(base, mlp) / (gradient_norm(pivot, mlp) + 1e-4)
        total = total + config.w_pivot * weight.clamp(max=1e5) * pivot
    if config.discriminator is not None and step >= config.gan_loss_start_step:
        gan = -plain_logits(objective, plain_augment(x_hat, AUGMENT_GENERATOR)).mean()
        last = model.decoder.last_weight
        weight = (gradient_norm(base, last) / (gradient_norm(gan, last) + 1e-6)).clamp(max=1e4)
        total = total + config.w_gan * weight * gan
    return total
