"""How well images are recognised from frozen features: top-1 and top-5 of a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from base import files
from base.config import UserError
from data.image_set import ImageSet, Item
from evaluation.features.feature_files import ScoreFiles
from evaluation.image_source import LooseImages, RoleImages
from evaluation.runner import Measurement

NUM_RANKED = 5


def ranked(logits: Tensor) -> Tensor:
    """[B, K] -> the most probable classes, most probable first, int64 [B, min(K, NUM_RANKED)]."""
    return logits.topk(min(NUM_RANKED, logits.shape[1]), dim=1).indices


class Classifier(Protocol):
    """An encoder with a classification head."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Preparation, features and head in words, as JSON values."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of encoder and head."""

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] each -> its classes as `ranked` gives them, int64 [B, min(K, NUM_RANKED)]."""


class _RankedClasses:
    """A classifier's most probable classes as rows to store; implements RowFunction."""

    name = "linear probe"

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.dim = min(NUM_RANKED, classifier.num_classes)
        self.fingerprint = files.digest([dict(classifier.protocol), dict(classifier.fingerprints)])

    def __call__(self, images: list[Tensor], /) -> Tensor:
        """uint8 [3, H, W] each -> float64 [B, D]: class numbers, which float64 holds exactly."""
        return self._classifier(images).double()


class LinearProbeSuite:
    """Compares the class of `original` with meta["label"]; implements Suite and CollectingSuite of evaluation.runner.

    The most probable classes of every image go to `store`.
    """

    name = "linear_probe"
    roles = ("original",)

    def __init__(self, classifier: Classifier, store: Path) -> None:
        self._ranked, self._store = _RankedClasses(classifier), store
        self._images = RoleImages("original")
        self.protocol: Mapping[str, Any] = {
            "top1": "most probable class is meta.label",
            "top5": f"meta.label is among the {NUM_RANKED} most probable classes",
            **classifier.protocol,
        }
        self.fingerprints = classifier.fingerprints

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Computes classes of images that are not in the store yet. Raises UserError: a label that is no integer."""
        for item in items:  # before the hours of work, not after
            _label(item)
        self._classes(images, items).collect(rank, world)

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """top1 and top5 of every item; their intervals are Wilson's."""
        rows = (row for block in self._classes(images, items).blocks() for row in block.long().tolist())
        found = []
        for item, best in zip(items, rows, strict=True):
            label = _label(item)
            right = {"top1": best[0] == label, "top5": label in best}
            found.append(Measurement(right, detail={"predicted": best[0]}))
        return found

    def _classes(self, images: ImageSet, items: Sequence[Item]) -> ScoreFiles[list[Tensor]]:
        return ScoreFiles(self._store, self._ranked, LooseImages(self._images.of(images, items)))


def _label(item: Item) -> int:
    label = item.field("label")
    if not isinstance(label, int):
        raise UserError(f"item '{item.key}': meta.label must be an integer, not {label!r}")
    return label
