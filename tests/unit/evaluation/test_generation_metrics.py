"""Inception score, precision and recall, KID and CMMD against their definitions, one number at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from base.config import UserError
from evaluation.metrics import manifold
from evaluation.metrics.inception_score import inception_score
from evaluation.metrics.kernel_distance import cmmd, kid, unbiased_polynomial_mmd
from evaluation.metrics.manifold import in_manifold, radii, squared_distances
from helpers.rows import TensorRows


def vectors(num: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_inception_score_of_one_hot_classes_is_their_number() -> None:
    rows = TensorRows(100.0 * torch.eye(4).repeat(5, 1))
    assert inception_score(rows, torch.eye(4)) == pytest.approx([4.0], rel=1e-12)
    assert inception_score(TensorRows(torch.zeros(8, 4)), torch.eye(4)) == pytest.approx([1.0], rel=1e-12)


def test_inception_score_is_the_definition_on_splits_in_order() -> None:
    x, weight = vectors(23, 6, 0), vectors(9, 6, 1)
    expected = []
    for part in (x[:10], x[10:20], x[20:]):
        p = (part.double() @ weight.double().T).softmax(1)
        expected.append(math.exp((p * (p.log() - p.mean(0).log())).sum(1).mean().item()))
    assert inception_score(TensorRows(x), weight, split_images=10) == pytest.approx(expected, rel=1e-10)


def test_inception_score_of_one_split_is_torchmetrics() -> None:
    theirs = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    logits = vectors(40, 12, 2)
    theirs.features.append(logits)
    (ours,) = inception_score(TensorRows(logits), torch.eye(12))
    assert ours == pytest.approx(float(theirs.compute()[0]), rel=1e-5)  # theirs is fp32


def brute_force(queries: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.square(a - b).sum())

    reach = [sorted(distance(p, q) for q in points)[k] for p in points]
    return [any(distance(q, p) <= r for p, r in zip(points, reach, strict=True)) for q in queries]


@pytest.mark.parametrize("block", [5, 64])
def test_precision_and_recall_are_brute_force_in_any_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = vectors(37, 3, 3), vectors(29, 3, 4, shift=0.7)
    monkeypatch.setattr(manifold, "blocks", lambda rows: _blocks(rows, block))
    for queries, points in ((fake, real), (real, fake)):
        rows = TensorRows(points)
        found = in_manifold(TensorRows(queries), rows, radii(rows))
        expected = brute_force(queries.double().numpy(), points.double().numpy(), 3)
        assert found.tolist() == expected
        assert 0 < sum(expected) < len(expected)


def _blocks(rows: TensorRows, count: int) -> list[tuple[int, Tensor]]:
    return [(start, rows.read(start, start + count)) for start in range(0, len(rows), count)]


def test_a_set_is_in_its_own_manifold() -> None:
    rows = TensorRows(vectors(50, 4, 5))
    assert in_manifold(rows, rows, radii(rows)).all()
    assert not in_manifold(TensorRows(vectors(5, 4, 6, shift=50.0)), rows, radii(rows)).any()


def test_fp16_distances_are_coarse_and_repeat_an_overflow_in_fp32() -> None:
    x, y = vectors(8, 64, 7), vectors(8, 64, 8)
    exact, half = squared_distances(x, y), squared_distances(x, y, "fp16")
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0.5)  # 11 bits of norms near 64
    assert torch.equal(squared_distances(100 * x, 100 * y, "fp16"), squared_distances(100 * x, 100 * y))


def test_kid_of_whole_sets_is_torchmetrics_and_does_not_depend_on_the_seed() -> None:
    x, y = vectors(60, 5, 9), vectors(60, 5, 10, shift=0.3)
    expected = float(poly_mmd(x.double(), y.double(), degree=3, gamma=None, coef=1.0))
    assert unbiased_polynomial_mmd(x.double(), y.double()) == pytest.approx(expected, rel=1e-9)
    found = kid(TensorRows(x), TensorRows(y), num_subsets=3)
    assert found.mean == pytest.approx(expected, rel=1e-9) and found.std < 1e-12 and found.subset_images == 60


def test_kid_of_subsets_repeats_with_its_seed() -> None:
    x, y = TensorRows(vectors(80, 5, 11)), TensorRows(vectors(50, 5, 12))
    first = kid(x, y, num_subsets=5, subset_images=20)
    assert first == kid(x, y, num_subsets=5, subset_images=20) and first.std > 0
    assert first != kid(x, y, num_subsets=5, subset_images=20, seed=1)
    with pytest.raises(UserError, match="needs two images"):
        kid(TensorRows(vectors(1, 5, 0)), y)


def test_cmmd_is_its_definition() -> None:
    x, y = vectors(20, 6, 13), vectors(15, 6, 14, shift=1.0)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-np.square(u - v).sum() / 200) for v in b] for u in a]))

    a, b = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (x, y))
    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(TensorRows(x), TensorRows(y)) == pytest.approx(expected, rel=1e-9)
    assert cmmd(TensorRows(x), TensorRows(x)) == pytest.approx(0.0, abs=1e-9)
