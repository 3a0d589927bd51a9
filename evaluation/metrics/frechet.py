"""Fréchet distance between two sets of features, from streamed statistics (FID: Heusel et al. 2017, eq. 6).

Counts, means and scatters are added up in fp64, in any number of parts, on any number of machines. Merged parts
equal a single pass up to the rounding of fp64 (1e-9 relative is tested).

Shapes: n images, D features.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from base import files, limits
from base.config import UserError

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FeatureStatistics:
    """The statistics of a set of features that the distance needs."""

    features: str  # fingerprint of the feature network
    count: int
    mean: F64  # [D]
    scatter: F64  # [D, D], sum over images of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: str, values: Tensor) -> FeatureStatistics:
        """Statistics of float [n, D]. Raises UserError: a feature that is not finite."""
        x = values.detach().cpu().double().numpy()
        if not np.isfinite(x).all():
            raise UserError("features: some are not finite; look at the images and the network's weights")
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(features, len(x), mean, centred.T @ centred)

    @classmethod
    def stream(cls, features: str, batches: Iterable[Tensor]) -> FeatureStatistics:
        """Statistics of all batches together, at least one. No batch is kept."""
        return reduce(cls.merge, (cls.of(features, batch) for batch in batches))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together (Chan et al. 1979). No large sums are subtracted, so no digits cancel.

        Raises UserError: the sets' features come from different networks.
        """
        _check_same_network(self, other)
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        mean = self.mean + step * (other.count / count)
        return FeatureStatistics(self.features, count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> F64:
        """Unbiased covariance, [D, D]. Raises UserError: fewer than two images."""
        if self.count < 2:
            raise UserError(f"features of {self.count} image: a covariance needs two; give more images")
        return self.scatter / (self.count - 1)

    def save(self, path: str | Path) -> None:
        """Writes a .npz file atomically."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            features=np.array(self.features),
            count=np.array(self.count),
            mean=self.mean,
            scatter=self.scatter,
        )
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Reads what `save` wrote. Raises UserError: no such file, or a file of another kind."""
        try:
            limits.check_regular(path)
            with np.load(path, allow_pickle=False) as stored:
                found = {name: stored[name] for name in ("features", "count", "mean", "scatter")}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; compute these statistics first") from None
        except (KeyError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{path}: holds no feature statistics; compute them again") from None
        return cls(str(found["features"]), int(found["count"]), found["mean"], found["scatter"])


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Fréchet distance of the two sets' Gaussians. Raises UserError: different networks, fewer than two images."""
    _check_same_network(first, second)
    return gaussian_distance(first.mean, first.covariance, second.mean, second.covariance)


def gaussian_distance(mean_a: F64, covariance_a: F64, mean_b: F64, covariance_b: F64) -> float:
    """|m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) (Dowson & Landau 1982).

    With S = R R^T the last trace is the sum of the singular values of R_a^T R_b. Unlike a square root of the
    product, which is not symmetric, this sum stays exact for singular matrices and never turns complex.
    """
    overlap = np.linalg.svd(_root(covariance_a).T @ _root(covariance_b), compute_uv=False).sum()
    shift = np.square(mean_a - mean_b).sum()
    return max(float(shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap), 0.0)


def caveat(*sets: FeatureStatistics) -> str:
    """Why a distance from so few images is a poor estimate of the true one; "" for enough images."""
    count, dim = min(s.count for s in sets), len(sets[0].mean)
    if count > dim:
        return ""
    return (
        f"biased upwards: {count} images give no full covariance of {dim} features; "
        "compare only with sets of the same size"
    )


def _root(covariance: F64) -> F64:
    """R with R R^T = covariance, [D, rank]; directions that are only rounding error are left out."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)
    root: F64 = vectors[:, kept] * np.sqrt(values[kept])
    return root


def _check_same_network(first: FeatureStatistics, second: FeatureStatistics) -> None:
    if first.features != second.features or first.mean.shape != second.mean.shape:
        raise UserError(
            f"features of two networks ({first.features[:12]} and {second.features[:12]}) cannot be compared; "
            "compute both with one"
        )
