"""Inception score (Salimans et al. 2016) as ADM computes it: splits of 5,000 images, in the images' order.

ADM's classifier is softmax(pool3 W) *without* the bias of the published network.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evaluation.metrics.rows import Rows

SPLIT_IMAGES = 5000
BLOCK_ROWS = 500  # divides SPLIT_IMAGES: a split is whole blocks


def inception_score(rows: Rows, weight: Tensor, split_images: int = SPLIT_IMAGES) -> list[float]:
    """exp E KL(p(y|x) || p(y)) of every split; their mean is the score. `weight`: [K, D].

    With p = softmax and q the mean of p, E KL is the mean of sum p log p, minus sum q log q: one pass, sums in fp64.
    """
    scores = []
    for first in range(0, len(rows), split_images):
        last = min(first + split_images, len(rows))
        total = torch.zeros(len(weight), dtype=torch.float64)
        negentropy = 0.0
        for start in range(first, last, BLOCK_ROWS):
            logits = rows.read(start, min(start + BLOCK_ROWS, last)).double() @ weight.double().T
            logs = logits.log_softmax(dim=1)
            probabilities = logs.exp()
            total += probabilities.sum(dim=0)
            negentropy += float((probabilities * logs).sum())
        mean = total / (last - first)
        marginal = float((mean * mean.clamp_min(torch.finfo(torch.float64).tiny).log()).sum())
        scores.append(math.exp(negentropy / (last - first) - marginal))
    return scores
