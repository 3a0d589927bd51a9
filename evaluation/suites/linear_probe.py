"""How well images are recognised from frozen features: top-1 and top-5 of a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.config import UserError
from evaluation.features.interface import IMAGES_PER_CALL, FeatureExtractor
from evaluation.manifest import ImageSet, Item
from evaluation.metrics.probe import LinearProbe
from evaluation.runner import Measurement

NUM_RANKED = 5


def ranked(logits: Tensor) -> Tensor:
    """[B, K] -> the most probable classes, the best first, int64 [B, min(K, NUM_RANKED)]."""
    return logits.topk(min(NUM_RANKED, logits.shape[1]), dim=1).indices


class Classifier(Protocol):
    """An encoder with a head."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Preparation, features and head in words, JSON-able."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of encoder and head."""

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] each -> its classes from the most probable down, at most NUM_RANKED, int64 [B, R]."""


class ProbeClassifier:
    """A probe of evaluation.metrics.probe on the features it was fitted to; implements Classifier."""

    def __init__(self, features: FeatureExtractor, probe: LinearProbe) -> None:
        self._features, self._probe = features, probe
        self.fingerprints = {"encoder": features.fingerprint, "head": probe.fingerprint}
        self.protocol: Mapping[str, Any] = {
            "features": dict(features.protocol),
            "head": f"multinomial logistic regression, standardised features, l2 {probe.l2}",
        }

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] of one size -> int64 [B, R]."""
        return ranked(self._probe.logits(self._features(torch.stack(list(images)))))


class LinearProbeSuite:
    """Compares the class of `original` with meta["label"]; implements evaluation.runner.Suite."""

    name = "linear_probe"
    roles = ("original",)

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.protocol: Mapping[str, Any] = {
            "top1": "most probable class is meta.label",
            "top5": f"meta.label is among the {NUM_RANKED} most probable classes",
            **classifier.protocol,
        }
        self.fingerprints = classifier.fingerprints

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """top1 and top5 of every item, whose intervals are Wilson's. Raises UserError: a label that is no integer."""
        found = []
        for start in range(0, len(items), IMAGES_PER_CALL):
            part = items[start : start + IMAGES_PER_CALL]
            classes = self._classifier([images.read(item, "original") for item in part]).tolist()
            for item, best in zip(part, classes, strict=True):
                label = item.field("label")
                if not isinstance(label, int):
                    raise UserError(f"item '{item.key}': meta.label must be an integer, not {label!r}")
                right = {"top1": best[0] == label, "top5": label in best}
                found.append(Measurement(right, detail={"predicted": best[0]}))
        return found
