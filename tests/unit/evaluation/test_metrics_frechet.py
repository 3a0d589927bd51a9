"""Fréchet distance: closed forms, and statistics that do not depend on how the images were split."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base.config import UserError
from evaluation.metrics.frechet import (
    FeatureStatistics,
    caveat,
    frechet_distance,
    gaussian_distance,
)


def features(num: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, far from zero, fp32 as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(num, dim, generator=generator) @ mixing + 30.0 + shift


def test_distance_of_commuting_gaussians_is_the_closed_form() -> None:
    # Diagonal covariances commute: |m|^2 + sum (sqrt a - sqrt b)^2.
    a, b = np.array([4.0, 9.0, 0.0, 1e-8]), np.array([1.0, 25.0, 4.0, 0.0])
    shift = np.array([3.0, 0.0, -1.0, 0.5])
    expected = np.square(shift).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = gaussian_distance(shift, np.diag(a), np.zeros(4), np.diag(b))
    assert found == pytest.approx(expected, rel=1e-12)  # fp64, a few operations


def test_distance_does_not_change_when_both_gaussians_are_turned() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    a, b = np.diag([4.0, 9.0, 0.5, 2.0]), np.diag([1.0, 25.0, 4.0, 0.1])
    mean = rng.standard_normal(4)
    plain = gaussian_distance(mean, a, np.zeros(4), b)
    turned = [rotation @ covariance @ rotation.T for covariance in (a, b)]
    assert gaussian_distance(rotation @ mean, turned[0], np.zeros(4), turned[1]) == pytest.approx(
        plain, rel=1e-12
    )


def test_scaled_gaussian_is_the_closed_form_even_when_singular() -> None:
    # S_b = c^2 S_a of rank 3 in 6 dimensions: (1 - c)^2 tr S_a.
    factor = np.random.default_rng(1).standard_normal((6, 3))
    covariance = factor @ factor.T
    found = gaussian_distance(np.zeros(6), covariance, np.zeros(6), 4.0 * covariance)
    assert found == pytest.approx(np.trace(covariance), rel=1e-9)  # eigenvectors of equal directions


def test_a_set_has_distance_zero_from_itself() -> None:
    statistics = FeatureStatistics.of("net", features(50, 8, seed=0))
    # A difference of traces of about 500 in fp64.
    assert frechet_distance(statistics, statistics) == pytest.approx(0.0, abs=1e-9)


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    values = features(40, 6, seed=1)
    statistics = FeatureStatistics.of("net", values)
    exact = values.double().numpy()
    np.testing.assert_allclose(statistics.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(exact, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("sizes", [(100,), (1,) * 100, (7, 50, 1, 42), (99, 1)])
def test_any_split_gives_the_single_pass(sizes: tuple[int, ...]) -> None:
    values, others = features(100, 8, seed=2), features(100, 8, seed=3, shift=0.2)
    single, reference = FeatureStatistics.of("net", values), FeatureStatistics.of("net", others)
    streamed = FeatureStatistics.stream("net", torch.split(values, list(sizes)))
    assert streamed.count == 100
    np.testing.assert_allclose(streamed.mean, single.mean, rtol=1e-12)
    # The scatter's off-diagonals may be near zero: relative to its largest entry.
    np.testing.assert_allclose(
        streamed.scatter, single.scatter, rtol=0, atol=1e-12 * np.abs(single.scatter).max()
    )
    expected = frechet_distance(single, reference)
    assert frechet_distance(streamed, reference) == pytest.approx(expected, rel=1e-9)


def test_shards_of_several_machines_merge_in_any_order_from_their_files(tmp_path: Path) -> None:
    values = features(90, 8, seed=4)
    for rank in range(3):
        FeatureStatistics.of("net", values[rank::3]).save(tmp_path / f"{rank}.npz")
    shards = [FeatureStatistics.load(tmp_path / f"{rank}.npz") for rank in (2, 0, 1)]
    merged = shards[0].merge(shards[1]).merge(shards[2])
    single = FeatureStatistics.of("net", values)
    reference = FeatureStatistics.of("net", features(90, 8, seed=5))
    assert merged.count == 90 and merged.features == "net"
    assert frechet_distance(merged, reference) == pytest.approx(frechet_distance(single, reference), rel=1e-9)


def test_nothing_cancels_far_from_zero() -> None:
    # Sums of squares would lose everything here: 1e8 ^ 2 leaves no digits for a variance of 1 in fp64.
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(6)).double() + 1e8
    streamed = FeatureStatistics.stream("net", torch.split(values, 16))
    exact = np.cov((values - 1e8).numpy(), rowvar=False)
    np.testing.assert_allclose(streamed.covariance, exact, atol=1e-6)  # 1e8 has steps of 1.5e-8


def test_features_of_two_networks_are_never_compared() -> None:
    first, second = (FeatureStatistics.of(name, features(10, 3, seed=0)) for name in ("a" * 64, "b" * 64))
    with pytest.raises(UserError, match="two networks"):
        frechet_distance(first, second)
    with pytest.raises(UserError, match="two networks"):
        first.merge(second)


def test_too_few_images_are_refused_or_named() -> None:
    one, few, enough = (FeatureStatistics.of("net", features(n, 4, seed=0)) for n in (1, 4, 5))
    with pytest.raises(UserError, match="needs two"):
        frechet_distance(one, few)
    assert "biased upwards: 4 images" in caveat(enough, few)
    assert caveat(enough, enough) == ""


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        FeatureStatistics.of("net", torch.tensor([[1.0], [float("nan")]]))


@pytest.mark.parametrize("payload", [None, b"torn", b""])
def test_a_file_without_statistics_is_one_clear_line(tmp_path: Path, payload: bytes | None) -> None:
    path = tmp_path / "reference.npz"
    if payload is not None:
        path.write_bytes(payload)
    with pytest.raises(UserError, match=r"reference\.npz"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(UserError, match="no feature statistics"):
        FeatureStatistics.load(path)
