"""Loss terms, noise, augmentation, perceptual distances, discriminator."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base.config import ConfigError, UserError
from helpers.stages import VIT
from tokenizer.moments import Moments
from tokenizer.training import losses
from tokenizer.training.diffaug import augment, translate
from tokenizer.training.discriminator import FrozenFeatures, Head, Heads, SpectralConv1d, frozen_logits
from tokenizer.training.perceptual import LpipsVgg16, RepresentationDistance, build_perceptual
from tokenizer.training.seeds import Purpose, generator
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig
from tokenizer.weights import state_hash


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=seeded(1))


def test_kl_is_twice_the_divergence_per_element() -> None:
    mu, logvar = torch.randn(2, 5, 3, 3, generator=seeded()), torch.randn(2, 5, 3, 3, generator=seeded(1))
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    expected = 2 * torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.kl(mu, logvar), expected)
    assert float(losses.kl(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))) == 0.0


def test_pivot_losses() -> None:
    f = torch.tensor([[3.0, 4.0]]).view(1, 2, 1, 1)
    pivot = torch.tensor([[0.0, 2.0]]).view(1, 2, 1, 1)
    assert float(losses.pivot(f, pivot, "raw")) == pytest.approx((9 + 4) / 2)
    # Unit vectors (0.6, 0.8) and (0, 1).
    assert float(losses.pivot(f, pivot, "normalised")) == pytest.approx((0.36 + 0.04) / 2)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert float(losses.discriminator_hinge(real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    assert float(losses.generator_hinge(fake)) == pytest.approx(0.75)


def test_quantised_images_hold_256_values_in_range() -> None:
    quantised = losses.quantise(torch.tensor([-0.2, 0.1, 0.5, 1.7]))
    assert (quantised * 255).tolist() == pytest.approx([0, 26, 128, 255])


def test_psnr_of_a_known_error() -> None:
    image = torch.full((2, 3, 4, 4), 0.5)
    image_hat = image.clone()
    image_hat[1] += 0.1
    assert losses.psnr_db(image_hat, image).tolist() == pytest.approx([100.0, 20.0], abs=1e-4)


@pytest.mark.parametrize(("law", "mean"), [("gaussian", 0.8 * math.sqrt(2 / math.pi)), ("uniform", 0.4)])
def test_noise_has_one_sigma_per_sample(law: losses.NoiseLaw, mean: float) -> None:
    f = torch.zeros(2000, 8, 4, 4)
    sigma = losses.add_noise(f, 0.8, law, seeded()).std(dim=(1, 2, 3))
    # 2000 sigmas with a deviation of at most 0.49: standard error 0.011; four of them are allowed.
    assert abs(float(sigma.mean()) - mean) < 0.045
    assert float(sigma.max()) > 2 * float(sigma.mean()) or law == "uniform"
    assert float(sigma.std()) > 0.2
    assert torch.equal(losses.add_noise(f, 0.0, law, seeded()), f)


def test_random_streams_are_independent_and_repeatable() -> None:
    draws = {
        (seed, purpose): float(torch.rand((), generator=generator(seed, purpose, torch.device("cpu"))))
        for seed in (0, 1, 2**63 - 1)
        for purpose in Purpose
    }
    assert len(set(draws.values())) == len(draws)
    again = torch.rand((), generator=generator(1, Purpose.LATENT, torch.device("cpu")))
    assert draws[1, Purpose.LATENT] == float(again)


def test_translation_moves_down_and_right_and_fills_with_zeros() -> None:
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    moved = translate(image, torch.tensor([[1, -2]]))[0, 0]
    assert moved.tolist() == [[0, 0, 0, 0], [3, 4, 0, 0], [7, 8, 0, 0], [11, 12, 0, 0]]


def test_translation_has_the_exact_gradient() -> None:
    image = torch.rand(2, 2, 4, 5, dtype=torch.float64, generator=seeded(), requires_grad=True)
    shifts = torch.tensor([[1, -2], [-3, 0]])
    assert torch.autograd.gradcheck(lambda x: translate(x, shifts), (image,))


def test_augmentation_is_a_function_of_the_generator() -> None:
    assert torch.equal(augment(images(), seeded()), augment(images(), seeded()))
    assert not torch.equal(augment(images(), seeded()), augment(images(), seeded(1)))


def test_augmentation_keeps_most_of_the_image_and_passes_gradients() -> None:
    pixels = images().requires_grad_()
    augment(pixels, seeded()).sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None
    kept = (pixels.grad != 0).float().mean()
    assert float(kept) >= (1 - 1 / 8) ** 2  # a shift of at most an eighth of either side


def test_spectral_convolution_has_norm_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(
            0
        )  # other weights may have two singular values so close that more iterations are needed
        convolution = SpectralConv1d(12, 8, 3)
    for _ in range(200):
        convolution.step_power_iteration()
    norm = torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2)
    probe = torch.randn(1, 12, 9, generator=seeded())
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(probe, (1, 1), mode="circular"), convolution.weight / norm, convolution.bias
    )
    # 200 power iterations leave an error of (s2/s1)^400 in the norm; fp32 rounding dominates.
    torch.testing.assert_close(convolution(probe), expected, rtol=1e-4, atol=1e-5)


def test_head_treats_every_sample_alone() -> None:
    head = Head(48, 9)
    tokens = torch.randn(5, 48, 16, generator=seeded())
    # Batched and single matrix products may sum in another order: fp32 rounding.
    torch.testing.assert_close(head(tokens)[2:3], head(tokens[2:3]), rtol=1e-5, atol=1e-5)


def discriminator() -> tuple[FrozenFeatures, Heads]:
    config = DiscriminatorConfig(VIT, depths=(0, 2), kernel_size=9)
    return FrozenFeatures(config), Heads(48, config)


def test_generator_loss_reaches_the_image_but_not_the_heads() -> None:
    features, heads = discriminator()
    pixels = images().requires_grad_()
    logits = frozen_logits(heads, features(pixels))
    assert logits.shape == (3, 2 * 16)
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert pixels.grad is not None and float(pixels.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in [*heads.parameters(), *features.parameters()])
    assert torch.equal(logits, heads(features(pixels)))


def test_spectral_norms_move_once_per_global_step() -> None:
    _, heads = discriminator()
    conv = heads.heads[0].second
    heads.begin_step(7)
    after_first = conv.left.clone()
    heads.begin_step(7)
    assert torch.equal(conv.left, after_first)
    heads.begin_step(8)
    assert not torch.equal(conv.left, after_first)


def test_even_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be odd"):
        DiscriminatorConfig(VIT, kernel_size=8)


@pytest.fixture(scope="module")
def lpips() -> LpipsVgg16:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LpipsVgg16()


@pytest.fixture(scope="module")
def representation_distance() -> RepresentationDistance:
    return RepresentationDistance(VIT, (0, 2))


@pytest.mark.parametrize("name", ["lpips", "representation_distance"])
def test_perceptual_distance_is_zero_only_for_equal_images(name: str, request: pytest.FixtureRequest) -> None:
    distance = request.getfixturevalue(name)
    other = images().roll(3, dims=3)
    assert distance(images(), distance.reference(images())).tolist() == [0.0] * 3
    assert float(distance(other, distance.reference(images())).min()) > 0
    assert "perceptual loss" in distance.describe()


def test_lpips_gradient_is_finite_where_all_features_are_zero(lpips: LpipsVgg16) -> None:
    with torch.no_grad():
        saved = lpips.vgg[0].bias.clone()
        lpips.vgg[0].bias.fill_(-1e4)
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips(black, lpips.reference(images(1))).sum().backward()
    with torch.no_grad():
        lpips.vgg[0].bias.copy_(saved)
    assert black.grad is not None and bool(black.grad.isfinite().all())


def test_missing_vgg_weights_name_the_alternative(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"perceptual\.kind to 'representation'") as caught:
        build_perceptual(PerceptualConfig(vgg16_weights=str(tmp_path / "vgg16.pth")))
    assert "\n" not in str(caught.value)


def test_vgg_weights_are_read_from_a_local_file(tmp_path: Path, lpips: LpipsVgg16) -> None:
    state = {f"features.{name}": tensor for name, tensor in lpips.vgg.state_dict().items()}
    torch.save({**state, "classifier.0.bias": torch.zeros(1)}, tmp_path / "vgg16.pth")
    loaded = build_perceptual(PerceptualConfig(vgg16_weights=str(tmp_path / "vgg16.pth")))
    assert loaded is not None and state_hash(loaded) == state_hash(lpips)


def test_moments_merge_to_those_of_all_values() -> None:
    values = torch.randn(20, 3, 2, 2, dtype=torch.float64, generator=seeded()) * 3 + 100
    parts = []
    for piece in values.split([7, 1, 12]):  # type: ignore[no-untyped-call]
        part = Moments(3)
        part.add(piece.numpy())
        parts.append(Moments.from_state_dict(part.state_dict()))
    merged = Moments(3)
    for part in parts:
        merged.merge(part)
    # fp64 throughout: a few roundings of 1e-16 each.
    assert merged.mean.tolist() == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), rel=1e-13)
    assert merged.std.tolist() == pytest.approx(values.std(dim=(0, 2, 3), unbiased=False).tolist(), rel=1e-12)
