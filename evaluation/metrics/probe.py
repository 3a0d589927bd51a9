"""A linear probe: multinomial logistic regression on frozen features, for data without a published head.

Features are standardised by the training set, the objective is
    mean cross-entropy + l2 / 2 |W|^2        (biases are free)
and strictly convex in W: full-batch L-BFGS in fp64 from zero finds the one optimum, without a seed, a learning
rate or a number of epochs to tune.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from base import files
from base.config import UserError
from evaluation.metrics.interval import Estimate, rate

L2 = 1e-3
MAX_ITERATIONS = 2000
HISTORY = 20
GRADIENT_TOLERANCE = 1e-7  # largest entry at which the optimum counts as found


@dataclass(frozen=True)
class LinearProbe:
    """argmax of standardised features times `weight` plus `bias`; all fp64."""

    mean: Tensor  # [D], of the training features
    std: Tensor  # [D]; 1 where a feature is constant
    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    l2: float

    @property
    def fingerprint(self) -> str:
        """Hash of all the probe's numbers."""
        tensors = (self.mean, self.std, self.weight, self.bias)
        return files.digest([tensor.tolist() for tensor in tensors])

    def logits(self, features: Tensor) -> Tensor:
        """float [N, D] -> fp64 [N, K]."""
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """float [N, D] -> most probable classes, int64 [N]."""
        return self.logits(features).argmax(dim=1)


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float = L2,
    tolerance: float = GRADIENT_TOLERANCE,
) -> LinearProbe:
    """The optimal probe for float [N, D] and int64 [N]; no entry of the gradient is above `tolerance`.

    Raises UserError: labels outside [0, num_classes), features that are not finite, no optimum found.
    """
    assert features.ndim == 2 and labels.shape == features.shape[:1] and len(labels)
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(
            f"linear probe: labels run from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 to {num_classes - 1}"
        )
    x = features.detach().double()
    if not bool(x.isfinite().all()):
        raise UserError("linear probe: some features are not finite; look at the images and the encoder")
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x = (x - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), labels) + l2 / 2 * weight.square().sum()

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        history_size=HISTORY,
        tolerance_grad=tolerance / 10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    residual = max(float(g.abs().max()) for g in torch.autograd.grad(objective(), [weight, bias]))
    if not residual <= tolerance:
        raise UserError(
            f"linear probe: the gradient is still {residual:.1e} after {MAX_ITERATIONS} iterations; "
            f"raise l2 (now {l2}) or the tolerance (now {tolerance})"
        )
    return LinearProbe(mean, std, weight.detach(), bias.detach(), l2)


def accuracy(probe: LinearProbe, features: Tensor, labels: Tensor) -> Estimate:
    """Top-1 accuracy with Wilson's interval; features float [N, D], labels int64 [N]."""
    return rate((probe.predict(features) == labels).tolist())
