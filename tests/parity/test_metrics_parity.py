"""Scores against other implementations: torchmetrics, scipy, lpips, and slow plain computations."""

import lpips
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from evaluation.metrics.probe import fit
from evaluation.metrics.reconstruction import Lpips, psnr_db, ssim
from tokenizer.training.perceptual import LpipsVgg16


def pairs(height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images with a flat area, and noisy copies: uint8 [4, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(4, 3, 4, 4, generator=generator)
    image = F.interpolate(coarse, size=(height, width), mode="bilinear") * 255
    image[:, :, : height // 3] = 90
    noise = (
        torch.randn(image.shape, generator=generator)
        * torch.tensor([0.0, 1.0, 8.0, 60.0])[:, None, None, None]
    )
    return image.to(torch.uint8), (image + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 57), (11, 11), (6, 9)])
def test_ssim_is_torchmetrics(height: int, width: int) -> None:
    image_metrics = pytest.importorskip("torchmetrics.functional.image")
    image, other = pairs(height, width)

    def theirs(dtype: torch.dtype) -> Tensor:
        found: Tensor = image_metrics.structural_similarity_index_measure(
            other.to(dtype) / 255,
            image.to(dtype) / 255,
            sigma=1.5,
            kernel_size=11,
            data_range=1.0,
            reduction="none",
        )
        return found.double()

    # In fp64 the same sums in another order; the window is theirs in the images' precision.
    torch.testing.assert_close(ssim(other, image), theirs(torch.float64), rtol=1e-9, atol=1e-9)
    # As the protocol runs it, fp32: variances of flat areas are rounding there, next to C2 = 9e-4.
    torch.testing.assert_close(ssim(other, image), theirs(torch.float32), rtol=0, atol=1e-4)


def test_ssim_is_wangs_formula_by_scipy() -> None:
    image, other = pairs(32, 40, seed=1)

    def blur(x: np.ndarray) -> np.ndarray:
        # truncate 3.5 gives a radius of 5 px; "mirror" reflects without repeating the edge.
        blurred: np.ndarray = scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5, mode="mirror")
        return blurred

    for ours, a, b in zip(ssim(other, image).tolist(), other.numpy() / 255, image.numpy() / 255, strict=True):
        maps = []
        for x, y in zip(a, b, strict=True):
            mx, my = blur(x), blur(y)
            vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
            top = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
            maps.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
        assert ours == pytest.approx(float(np.mean(maps)), abs=1e-9)  # fp64


def test_psnr_is_torchmetrics() -> None:
    image_metrics = pytest.importorskip("torchmetrics.functional.image")
    image, other = pairs(24, 24, seed=2)
    for i in range(1, 4):  # the first pair is equal: infinite there, MAX_DB here
        theirs = image_metrics.peak_signal_noise_ratio(other[i].double(), image[i].double(), data_range=255.0)
        # Theirs is summed in fp32 or fp64 by version: a few roundings of 1e-7 in about 30 dB.
        assert psnr_db(other[i : i + 1], image[i : i + 1]).item() == pytest.approx(float(theirs), rel=1e-5)


# lpips asks torchvision for weights through arguments that torchvision calls deprecated.
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_lpips_score_is_the_lpips_packages_on_pixels_in_minus_one_to_one() -> None:
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    torchvisions = torchvision.models.vgg16(weights=None, init_weights=False).features[:30]
    mine, others = (
        [layer for layer in module.modules() if isinstance(layer, torch.nn.Conv2d)]
        for module in (torchvisions, theirs.net)
    )
    for layer, other_layer in zip(mine, others, strict=True):
        layer.load_state_dict(other_layer.state_dict())
    network = LpipsVgg16()
    network.vgg.load_state_dict(torchvisions.state_dict())
    image, other = pairs(32, 48, seed=3)
    with torch.no_grad():
        expected = theirs(other / 127.5 - 1, image / 127.5 - 1).flatten()
    # fp32 through 13 convolutions.
    torch.testing.assert_close(Lpips(network)(other, image), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num", [200, 40])
def test_frechet_distance_is_the_matrix_square_root_of_scipy(num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sets = [
        torch.randn(num, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + shift
        for shift in (3.0, 3.5)
    ]
    ours = frechet_distance(*(FeatureStatistics.stream("net", torch.split(x, 33)) for x in sets))
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.double().numpy().mean(axis=0), np.cov(x.double().numpy(), rowvar=False)) for x in sets
    )
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert ours == pytest.approx(expected, rel=1e-9)  # fp64; sqrtm of a well-conditioned product


def test_probe_is_the_optimum_that_plain_gradient_descent_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator, dtype=torch.float64) * 3 + 1
    labels = (features[:, 0] + 2 * torch.randn(60, generator=generator) > 1).long() + (
        features[:, 1] > 3
    ).long()
    l2 = 0.05
    probe = fit(features, labels, num_classes=3, l2=l2)
    x = (features - features.mean(dim=0)) / features.std(dim=0, correction=0)
    weight, bias = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for tensor in (weight, bias):
        tensor.requires_grad_()
    for _ in range(4000):  # steps of 0.5 on a curvature between l2 and about 1: converged to 1e-12
        log_p = (x @ weight.T + bias).log_softmax(dim=1)
        loss = -log_p[torch.arange(60), labels].mean() + l2 / 2 * (weight**2).sum()
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            for tensor, gradient in zip((weight, bias), gradients, strict=True):
                tensor -= 0.5 * gradient
    assert max(float(g.abs().max()) for g in gradients) < 1e-10
    # The probe stops at a gradient of 1e-7; a curvature of 0.05 leaves 2e-6.
    torch.testing.assert_close(probe.weight, weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(probe.bias, bias.detach(), rtol=0, atol=1e-5)


def test_probe_is_the_optimum_of_scipys_solver() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((80, 6)), rng.integers(4, size=80)
    probe = fit(torch.from_numpy(features), torch.from_numpy(labels), num_classes=4, l2=1e-2)
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    targets = np.eye(4)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:24].reshape(4, 6), flat[24:]
        logits = x @ weight.T + bias
        log_z = np.log(np.exp(logits).sum(axis=1))
        loss = (log_z - (logits * targets).sum(axis=1)).mean() + 0.005 * np.square(weight).sum()
        residual = (np.exp(logits - log_z[:, None]) - targets) / len(x)
        gradient = np.concatenate([(residual.T @ x + 0.01 * weight).ravel(), residual.sum(axis=0)])
        return float(loss), gradient

    found = scipy.optimize.minimize(
        objective, np.zeros(28), jac=True, method="BFGS", options={"gtol": 1e-8}
    ).x
    np.testing.assert_allclose(probe.weight.numpy().ravel(), found[:24], atol=1e-4)  # gradients 1e-7, l2 1e-2
    np.testing.assert_allclose(probe.bias.numpy(), found[24:], atol=1e-4)
