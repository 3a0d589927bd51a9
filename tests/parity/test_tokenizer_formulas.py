"""The tokenizer stages against their formulas, on random weights, never those of an initialisation.

Networks themselves are compared in test_tokenizer_parity.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import stages
from helpers.stage_formulas import (
    AUGMENT_FAKE,
    AUGMENT_REAL,
    SEED,
    plain_augment,
    plain_logits,
    plain_loss,
    stream,
)
from helpers.stages import BRIDGE, VIT, built, pixel_batch
from helpers.weights import shake
from tokenizer.bridge import Bridge, sample_latent
from tokenizer.training.diffaug import augment
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.image_loss import AdversaryBatch
from tokenizer.training.objective_base import StageObjective

PIVOT = dataclasses.replace(
    stages.PIVOT,
    discriminator=DiscriminatorConfig(VIT, depths=(0, 2), kernel_size=5),
    adaptive_pivot_start_step=2,
    gan_update_start_step=1,
    gan_loss_start_step=3,
)
COUNT = 3  # pixel_batch's


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
    objective = built(stage, PIVOT, **changes)
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
    objective = built("pivot", PIVOT, w_lpips=1e9)
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
    objective = built("pivot", PIVOT)
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
