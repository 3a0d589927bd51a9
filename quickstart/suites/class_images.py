"""Do images drawn for a class show the class, and how far is the whole set from real images?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.image_set import ImageSet, Item
from evaluation.features.interface import IMAGES_PER_CALL, FeatureExtractor
from evaluation.metrics.frechet import FeatureStatistics, caveat, frechet_distance
from evaluation.runner import Measurement, SetScore
from quickstart.judge import THRESHOLD, Judge
from quickstart.pictures.scenes import OBJECT_NAMES
from quickstart.suites.text_to_image import verdict_detail


class EmojiClassSuite:
    """Judges `result` against meta["label"]; implements evaluation.runner.Suite and SetSuite.

    class_right: the judge sees the class's object and nothing else. class_best: no other object's score is as high.
    feature_distance: Fréchet distance of all results from all real images, in a network's features; it is no FID.
    """

    name = "emoji_class"
    roles = ("result",)

    def __init__(self, judge: Judge, features: FeatureExtractor, real: ImageSet) -> None:
        self._judge, self._features = judge, features
        self._real = self._statistics(real, real.items)
        self.protocol: Mapping[str, Any] = {
            "class_right": "exact set of objects",
            "judge_threshold": THRESHOLD,
            "feature_distance": {
                "distance": f"Fréchet, results against {len(real.items)} real images, sums in fp64",
                **features.protocol,
            },
        }
        self.fingerprints = {"judge": judge.fingerprint, "feature_distance": features.fingerprint}

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """class_right and class_best of every item."""
        measurements = []
        for item, verdict in zip(items, self._judge(images.read_all(items, "result")), strict=True):
            asked = OBJECT_NAMES[int(item.field("label"))]
            scores = verdict.object_scores
            values = {
                "class_right": verdict.objects == (asked,),
                "class_best": max(scores, key=lambda name: scores[name]) == asked,
            }
            measurements.append(Measurement(values, detail=verdict_detail(verdict)))
        return measurements

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The feature distance. Raises UserError: fewer than two images."""
        found = self._statistics(images, items)
        value = frechet_distance(found, self._real)
        return {"feature_distance": SetScore(value, n=found.count, note=caveat(found, self._real))}

    def _statistics(self, images: ImageSet, items: Sequence[Item]) -> FeatureStatistics:
        parts = [items[start : start + IMAGES_PER_CALL] for start in range(0, len(items), IMAGES_PER_CALL)]
        features = (self._features(images.read_all(part, "result")) for part in parts)
        return FeatureStatistics.stream(self._features.fingerprint, features)
