"""Improved precision and recall (Kynkaanniemi et al. 2019) as ADM computes them, in blocks.

A vector lies in a set's manifold if its distance to some vector v of the set is at most v's distance to v's k-th
nearest neighbour. Precision: share of samples in the reference's manifold; recall: the reverse.

Squared distances are |u|^2 - 2 u v + |v|^2, at least 0, as in ADM. ADM takes them in fp16 and repeats a block in
fp32 when one of its distances overflows; that raises both shares a little (about 0.18 and 0.25 points on ImageNet).
Here fp32 is the default and fp16 an option.

Shapes: N M vectors, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.config import Distances
from evaluation.metrics.rows import Rows, blocks

NEIGHBOURS = 3


def squared_distances(u_ND: Tensor, v_MD: Tensor, distances: Distances = "fp32") -> Tensor:
    """Squared distances of all pairs, float32 [N, M]."""
    if distances == "fp16":
        half = _squared(u_ND.half(), v_MD.half())
        if bool(half.isfinite().all()):
            return half.float()
    return _squared(u_ND.float(), v_MD.float())


def _squared(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    norms_u, norms_v = u_ND.square().sum(1), v_MD.square().sum(1)
    return (norms_u[:, None] - 2 * (u_ND @ v_MD.T) + norms_v[None]).clamp(min=0)


def radii(
    rows: Rows, k: int = NEIGHBOURS, distances: Distances = "fp32", device: str | torch.device = "cpu"
) -> Tensor:
    """Squared distance of every vector to its k-th nearest neighbour, float32 [N].

    The vector itself counts as the zeroth neighbour. A set with k or fewer other vectors gives the distance to the
    furthest of them.
    """
    found = []
    for _, block in blocks(rows):
        nearest = torch.empty(len(block), 0, device=device)
        for _, other in blocks(rows):
            part = squared_distances(block.to(device), other.to(device), distances)
            nearest = torch.cat([nearest, part], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False).values
        found.append(nearest.amax(dim=1).cpu())
    return torch.cat(found)


def in_manifold(
    queries: Rows,
    rows: Rows,
    squared_radii: Tensor,
    distances: Distances = "fp32",
    device: str | torch.device = "cpu",
) -> Tensor:
    """Whether each query lies in the manifold of `rows`, whose `radii` are given: bool [number of queries]."""
    found = []
    for _, block in blocks(queries):
        inside = torch.zeros(len(block), dtype=torch.bool, device=device)
        for start, other in blocks(rows):
            part = squared_distances(block.to(device), other.to(device), distances)
            inside |= (part <= squared_radii[start : start + len(other)].to(device)).any(dim=1)
        found.append(inside.cpu())
    return torch.cat(found)
