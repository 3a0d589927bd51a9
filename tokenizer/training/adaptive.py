"""Adaptive loss weights without full extra backward passes (docs/method.md, stage I).

The plain way differentiates every loss through the whole network to reach one layer's weight. Here every loss
is differentiated once towards the tensor where the graph is cut (x_hat, f). A shallow vector-Jacobian product leads
from that tensor to the last layer's weight, because autograd visits only the nodes between the two. The network's
own backward then runs once, with the weighted sum of the gradients.

These passes run inside the forward pass, under its autocast. On a GPU autocast is turned off for them, so that their
sums have the dtypes of the loop's own backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def gradient(loss: Tensor, tensor: Tensor, *, retain_graph: bool = False) -> Tensor:
    """d loss / d tensor, detached, in the shape of `tensor`."""
    with torch.autocast("cuda", enabled=False):
        return torch.autograd.grad(loss, tensor, retain_graph=retain_graph)[0]


def pull_back(output: Tensor, output_gradient: Tensor, tensor: Tensor) -> Tensor:
    """The vector-Jacobian product from `output` to `tensor`; the graph stays for the pass that trains."""
    with torch.autocast("cuda", enabled=False):
        return torch.autograd.grad(output, tensor, output_gradient, retain_graph=True)[0]


def back_once(
    output: Tensor, output_gradient: Tensor, tensor: Tensor, parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Runs the only backward pass from `output` to `tensor` and frees its graph.

    Returns the gradient of `tensor`, and a scalar 0. Backward through the scalar hands the gradients found here, once,
    to `tensor` and to those of `parameters` that are trained.
    """
    inputs = [tensor, *(parameter for parameter in parameters if parameter.requires_grad)]
    with torch.autocast("cuda", enabled=False):
        found = torch.autograd.grad(output, inputs, output_gradient, allow_unused=True)
    reached = [(x, gradient) for x, gradient in zip(inputs, found, strict=True) if gradient is not None]
    gradients = [gradient for _, gradient in reached]
    # The caller gets a copy, because the gradients handed on are scaled in place.
    return found[0].clone(), _HandOn.apply(gradients, *(x for x, _ in reached))


class _HandOn(torch.autograd.Function):
    """Returns 0; its backward pass hands on gradients found before, times the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=inputs[0].device)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, not kept: as large as D
        assert gradients is not None, "a second backward pass: the first one used the gradients up"
        torch._foreach_mul_(gradients, scale)
        return (None, *gradients)


def adaptive_weight(
    output: Tensor,
    weight: Tensor,
    main_gradient: Tensor,
    other_gradient: Tensor,
    *,
    eps: float,
    ceiling: float,
) -> Tensor:
    """lambda = ||d main/dW|| / (||d other/dW|| + eps), at most `ceiling` (VQGAN eq. 7; paper eq. 2).

    output: the tensor that both losses depend on and whose last layer has the parameter `weight`
    main_gradient, other_gradient: d loss / d output of the two losses
    Returns a detached fp32 scalar.
    """
    main = pull_back(output, main_gradient, weight).float().norm()
    other = pull_back(output, other_gradient, weight).float().norm()
    ratio: Tensor = main / (other + eps)
    return ratio.clamp(max=ceiling)


def weight_metrics(name: str, weight: Tensor, ceiling: float) -> dict[str, Tensor]:
    """The weight, and whether it stands at its ceiling (0 or 1; the logged mean is the share of micro-batches)."""
    return {name: weight, f"{name}_saturated": (weight >= ceiling).float()}


def carry(value: Tensor, surrogate: Tensor) -> Tensor:
    """A scalar with the value of `value` and the gradient of `surrogate`.

    `surrogate` is e.g. (x_hat * g).sum(), whose gradient towards x_hat is a g found before.
    """
    return surrogate + (value.detach() - surrogate.detach())
