"""The tokenizer stages' losses against the formulas of docs/method.md, written out here with plain autograd.

Nothing of tokenizer/training/ computes the expected side: noise, latents, augmentation, distances and adaptive weights
are made here from their equations, and random streams from their seeds. Weights are random, never those of an
initialisation. Networks themselves are compared in test_tokenizer_parity.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.stages import BRIDGE, PLAIN, VIT, pixel_batch
from helpers.weights import shake
from tokenizer.bridge import Bridge, sample_latent
from tokenizer.representation import Representation
from tokenizer.training.build_stage import build_untrained
from tokenizer.training.diffaug import augment
from tokenizer.training.discriminator import DiscriminatorConfig, Head
from tokenizer.training.image_loss import AdversaryBatch
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.objectives import PivotObjective
from tokenizer.training.perceptual import PerceptualConfig
from tokenizer.training.stage_config import StageConfig

DEPTHS = (0, 2)
WHOLE = dataclasses.replace(PLAIN, bridge=BRIDGE)
PIVOT = StageConfig(
    stage="pivot",
    autoencoder=PLAIN,
    perceptual=PerceptualConfig("representation", representation=VIT, depths=DEPTHS),
    discriminator=DiscriminatorConfig(VIT, depths=DEPTHS, kernel_size=5),
    adaptive_pivot_start_step=2,
    gan_update_start_step=1,
    gan_loss_start_step=3,
)
COUNT, SEED = 3, 5  # pixel_batch's
# The numbers of tokenizer/training/seeds.py, which are part of every run's results.
FEATURE_NOISE, LATENT, AUGMENT_GENERATOR, AUGMENT_REAL, AUGMENT_FAKE = range(5)


def stream(purpose: int) -> torch.Generator:
    """The stream of the batch's seed for one purpose: 63 bits of numpy's mixture of the two."""
    (mixed,) = np.random.SeedSequence((SEED, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed) // 2)


def build(stage: str, *, moved: float = 0.02, **changes: Any) -> StageObjective:
    """A stage as after some training: E has left its replica by weights of deviation `moved`."""
    config, shapes = dataclasses.replace(PIVOT, **changes), None
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


def plain_features(network: Representation, pixels_01: Tensor) -> list[Tensor]:
    """What the discriminator reads: patch tokens plus the class token, [B, D, N] of each depth."""
    return [
        (patches + prefix[:, :1]).transpose(1, 2)
        for patches, prefix in network.intermediates(pixels_01, DEPTHS)
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

    x = leaky(norm("first_norm", convolve("first", x)))
    x = (x + leaky(norm("second_norm", convolve("second", x)))) / math.sqrt(2)
    return convolve("logit", x)[:, 0]


def plain_logits(objective: StageObjective, pixels_01: Tensor) -> Tensor:
    loss = objective.image_loss
    assert loss.heads is not None and loss.features is not None
    levels = plain_features(loss.features.representation, pixels_01)
    return torch.cat([plain_head(head, x) for head, x in zip(loss.heads.heads, levels, strict=True)], dim=1)


def plain_distance(network: Representation, a: Tensor, b: Tensor) -> Tensor:
    """Mean over images, depths and tokens of the squared distance of unit-length patch tokens."""
    levels = []
    for (x, _), (y, _) in zip(
        network.intermediates(a, DEPTHS), network.intermediates(b, DEPTHS), strict=True
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
        assert perceptual is not None
        base = base + config.w_lpips * plain_distance(perceptual.representation, x_hat, x)
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


def gradients(objective: StageObjective, mean_loss: Tensor) -> dict[str, Tensor]:
    objective.model.zero_grad()
    mean_loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.clone()
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is not None
    }


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("pivot", {}),
    ("pivot", {"noise_law": "uniform", "w_pivot": 0.75, "w_gan": 0.1}),  # release
    ("pivot", {"pivot_loss": "normalised", "w_lpips": 0.05, "noise_tau": 0.02}),
    ("pivot", {"adaptive_pivot": False, "w_pivot": 0.25}),
    ("pivot", {"train_encoder": False}),
    ("pivot", {"moved": 1e-6}),  # E has hardly moved, so that 1e-4 below lambda_piv decides
    ("bridge", {}),
    ("bridge", {"noise_tau": 0.8, "noise_law": "uniform"}),  # release
    ("bridge", {"noise_tau": 0.3, "sample_latent": False, "kl_weight": 0.2, "rec_weight": 0.5}),
    ("decoder", {}),
    ("decoder", {"w_gan": 2.0, "w_lpips": 0.3}),
    ("joint", {"kl_weight": 0.2}),
    ("joint", {"sample_latent": False, "w_pivot": 0.0, "noise_law": "uniform", "w_lpips": 0.0}),
]


@pytest.mark.parametrize(
    ("stage", "changes"), SETTINGS, ids=[f"{stage} {changes}" for stage, changes in SETTINGS]
)
def test_every_stage_minimises_its_formula(stage: str, changes: dict[str, Any]) -> None:
    objective = build(stage, **changes)
    for step in (1, 2, 3):  # before lambda_piv, with it, with L_GAN
        output = objective.loss(pixel_batch(), step)
        found = gradients(objective, output.loss_sum / COUNT)
        plain = plain_loss(objective, step)
        expected = gradients(objective, plain)
        # fp32: the same sums in another order; entries far below the largest carry its rounding.
        assert float(output.loss_sum.detach()) / COUNT == pytest.approx(float(plain.detach()), rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_adaptive_weights_stop_at_their_ceilings() -> None:
    """A main loss a billion times as large: 1e5 and 1e4 (docs/method.md), and the log says that they are reached."""
    objective = build("pivot", w_lpips=1e9)
    metrics = {name: float(value) / COUNT for name, value in objective.loss(pixel_batch(), 3).metrics.items()}
    assert metrics["lambda_pivot"] == 1e5 and metrics["lambda_gan"] == 1e4
    assert metrics["lambda_pivot_saturated"] == metrics["lambda_gan_saturated"] == 1


def test_augmentation_is_diffaugments() -> None:
    pixels_01 = torch.rand(8, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found = augment(pixels_01, stream(AUGMENT_REAL))
    torch.testing.assert_close(
        found, plain_augment(pixels_01, AUGMENT_REAL), rtol=1e-5, atol=1e-6
    )  # fp32 sums


def test_translations_reach_an_eighth_of_either_side_both_ways() -> None:
    """A white square in 200 mid-grey images, which no colour moves: where it lies tells the shift."""
    pixels_01 = torch.full((200, 3, 32, 48), 0.5)
    pixels_01[:, :, 16, 24] = 1.0
    found = (augment(pixels_01, stream(AUGMENT_FAKE)) - 0.5).abs()
    inside = found[:, :, 4:-4, 6:-6].mean(1)  # what was shifted in stands outside
    brightest = (inside - inside.flatten(1).median(1).values[:, None, None]).abs().flatten(1).argmax(1)
    down, right = brightest // 36 - 12, brightest % 36 - 18
    # 200 draws miss one of 13 shifts with a probability of 1e-6.
    assert set(down.tolist()) == set(range(-4, 5)) and set(right.tolist()) == set(range(-6, 7))


def test_the_discriminator_reads_originals_and_reconstructions_augmented_each_by_its_own_stream() -> None:
    objective = build("pivot")
    images = torch.rand(2, COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    output = objective.adversary_loss(AdversaryBatch(*images, seed=SEED), 1)
    real, fake = (
        plain_logits(objective, plain_augment(part, purpose))
        for part, purpose in zip(images, (AUGMENT_REAL, AUGMENT_FAKE), strict=True)
    )
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(
        output.loss_sum / COUNT, hinge, rtol=1e-4, atol=1e-5
    )  # fp32 sums of 48 x 5 terms
    shares = {"accuracy_real": (real > 0), "accuracy_fake": (fake < 0)}
    for name, share in shares.items():
        assert 0 < float(share.float().mean()) < 1
        torch.testing.assert_close(output.metrics[name] / COUNT, share.float().mean())


def test_log_variances_are_kept_within_their_bounds_and_pass_inside_them() -> None:
    bridge = Bridge(BRIDGE, 48)
    shake(bridge, 6, 0.3)
    means_and_logs = torch.linspace(-60, 60, 12)
    with torch.no_grad():
        bridge.encoder.to_moments.weight.zero_()
        bridge.encoder.to_moments.bias.copy_(means_and_logs)
        mu, logvar = bridge.encoder(torch.randn(1, 48, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert mu[0, :, 0, 0].tolist() == means_and_logs[:6].tolist()
    expected = [min(max(value, -30.0), 20.0) for value in means_and_logs[6:].tolist()]
    assert logvar[0, :, 1, 1].tolist() == expected
    with torch.no_grad():
        bridge.encoder.to_moments.bias.copy_(torch.tensor([*[0.0] * 6, -31.0, -29.9, -1.0, 2.5, 19.9, 21.0]))
        _, logvar = bridge.encoder(torch.zeros(1, 48, 1, 1))
    torch.testing.assert_close(logvar.flatten(), torch.tensor([-30.0, -29.9, -1.0, 2.5, 19.9, 20.0]))


def test_a_latent_is_its_mean_and_a_draw_times_the_deviation() -> None:
    mu, logvar = torch.randn(2, 2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = sample_latent(mu, logvar, torch.Generator().manual_seed(9))
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(drawn, mu + logvar.exp().sqrt() * eps)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_bridges_hidden_widths_follow_their_ratios(part: str) -> None:
    ratio = {f"{part}_mlp_ratio": 0.5}
    bridge = Bridge(dataclasses.replace(BRIDGE, **ratio), 48)  # type: ignore[arg-type]
    mlps: Sequence[Any] = [layer.mlp for layer in bridge.decoder.layers]
    found = {
        "encoder": {bridge.encoder.mlp.up.out_features},
        "decoder": {mlp.up.out_features for mlp in mlps},
    }
    assert found == {"encoder": {48}, "decoder": {192}} | {part: {24}}
