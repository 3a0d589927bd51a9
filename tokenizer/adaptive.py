"""Adaptive loss weights without extra backward passes (contract 5).

The plain way differentiates every loss through the whole network to reach one layer's weight. Here every loss
is differentiated once towards the tensor where the graph is cut (x_hat, f); from there to the last layer's
weight is one shallow vector-Jacobian product, because autograd visits only the nodes between the tensor and
that weight. The network's own backward then runs once, with the weighted sum of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gradient(loss: Tensor, tensor: Tensor, *, retain_graph: bool = False) -> Tensor:
    """d loss / d tensor, detached, in the shape of `tensor`."""
    return torch.autograd.grad(loss, tensor, retain_graph=retain_graph)[0]


def pull_back(output: Tensor, output_gradient: Tensor, tensor: Tensor) -> Tensor:
    """The vector-Jacobian product from `output` to `tensor`; the graph stays for the pass that trains."""
    return torch.autograd.grad(output, tensor, output_gradient, retain_graph=True)[0]


def adaptive_weight(
    output: Tensor,
    weight: Tensor,
    main_gradient: Tensor,
    other_gradient: Tensor,
    *,
    eps: float,
    ceiling: float,
) -> Tensor:
    """lambda = ||d main/dW|| / (||d other/dW|| + eps), at most `ceiling` (VQGAN eq. 7; paper eq. 4).

    output: the tensor that both losses depend on and whose last layer has the parameter `weight`
    main_gradient, other_gradient: d loss / d output of the two losses
    Returns a detached fp32 scalar.
    """
    main = pull_back(output, main_gradient, weight).float().norm()
    other = pull_back(output, other_gradient, weight).float().norm()
    ratio: Tensor = main / (other + eps)
    return ratio.clamp(max=ceiling)


def weight_metrics(name: str, weight: Tensor, ceiling: float) -> dict[str, Tensor]:
    """The weight, and whether it stands at its ceiling (0 or 1; the logged mean is a share)."""
    return {name: weight, f"{name}_saturated": (weight >= ceiling).float()}


def carry(value: Tensor, surrogate: Tensor) -> Tensor:
    """A scalar that reads `value` and back-propagates `surrogate`.

    `surrogate` is e.g. (x_hat * g).sum(), whose gradient towards x_hat is the g found before.
    """
    return surrogate + (value.detach() - surrogate.detach())
