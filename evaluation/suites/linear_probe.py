"""How well images are recognised from frozen features: top-1 of a linear classifier."""

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


class Classifier(Protocol):
    """An encoder with a head."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Preparation, features and head in words, JSON-able."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of encoder and head."""

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] each -> class of each, int64 [B]."""


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
        """uint8 [3, H, W] of one size -> int64 [B]."""
        return self._probe.predict(self._features(torch.stack(list(images))))


class LinearProbeSuite:
    """Compares the class of `original` with meta["label"]; implements evaluation.runner.Suite."""

    name = "linear_probe"
    roles = ("original",)

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.protocol: Mapping[str, Any] = {
            "top1": "most probable class is meta.label",
            **classifier.protocol,
        }
        self.fingerprints = classifier.fingerprints

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """top1 of every item, whose interval is Wilson's. Raises UserError: a label that is no integer."""
        found = []
        for start in range(0, len(items), IMAGES_PER_CALL):
            part = items[start : start + IMAGES_PER_CALL]
            classes = self._classifier([images.read(item, "original") for item in part]).tolist()
            for item, predicted in zip(part, classes, strict=True):
                label = item.field("label")
                if not isinstance(label, int):
                    raise UserError(f"item '{item.key}': meta.label must be an integer, not {label!r}")
                found.append(Measurement({"top1": predicted == label}, detail={"predicted": predicted}))
        return found
