"""Kernel distances between two sets of features: KID (Binkowski et al. 2018) and CMMD (Jayasumana et al. 2024).

Both are a maximum mean discrepancy, mean k(x, x') + mean k(y, y') - 2 mean k(x, y).
- KID: k = (x y / D + 1)^3, unbiased (no pair of an image with itself), mean over random subsets.
- CMMD: k = exp(-|x - y|^2 / (2 sigma^2)) on unit vectors, sigma 10, biased (all pairs), times 1000.

Shapes: N M vectors, D features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from base.config import UserError
from evaluation.metrics.rows import Rows, blocks

NUM_SUBSETS = 100
SUBSET_IMAGES = 1000
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


@dataclass(frozen=True)
class KernelDistance:
    """KID as mean and spread over subsets."""

    mean: float
    std: float
    """Standard deviation between subsets. Subsets overlap, so it is no confidence interval."""
    num_subsets: int
    subset_images: int


def kid(
    first: Rows,
    second: Rows,
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_images: int = SUBSET_IMAGES,
    seed: int = 0,
) -> KernelDistance:
    """KID over subsets of equal size from both sets, drawn by `seed`, no image twice. Raises UserError: < 2 images."""
    size = min(subset_images, len(first), len(second))
    if size < 2:
        raise UserError(f"a kernel distance needs two images in each set, not {size}; give more images")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x, y = (
            rows.take(np.sort(generator.choice(len(rows), size, replace=False))).double()
            for rows in (first, second)
        )
        values.append(unbiased_polynomial_mmd(x, y))
    return KernelDistance(statistics.fmean(values), statistics.pstdev(values), num_subsets, size)


def unbiased_polynomial_mmd(x_ND: Tensor, y_ND: Tensor) -> float:
    """Unbiased squared MMD with KID's kernel of fp64 [N, D] and [N, D]."""
    n, dim = x_ND.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    own = sum(
        (k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (kernel(x_ND, x_ND), kernel(y_ND, y_ND))
    )
    return float(own - 2 * kernel(x_ND, y_ND).mean())


def cmmd(first: Rows, second: Rows, device: str | torch.device = "cpu") -> float:
    """CMMD of vectors scaled to length 1: all pairs, block by block, sums in fp64."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # |x - y|^2 = 2 - 2 x y. The ones cancel in the end; k - 1 keeps the digits that a 1 would cost.
        return torch.expm1((x @ y.T - 1) / CMMD_SIGMA**2)

    def mean(a: Rows, b: Rows) -> float:
        return _pair_mean(a, b, kernel, device)

    return CMMD_SCALE * (mean(first, first) + mean(second, second) - 2 * mean(first, second))


def _pair_mean(
    a: Rows, b: Rows, kernel: Callable[[Tensor, Tensor], Tensor], device: str | torch.device
) -> float:
    total = 0.0
    for _, x in blocks(a):
        for _, y in blocks(b):
            units = (F.normalize(part.to(device).double(), dim=1) for part in (x, y))
            total += float(kernel(*units).sum())
    return total / (len(a) * len(b))
