"""Do images drawn from captions show what the captions say?

On real held-out renders this suite gives the judge's own accuracy, which belongs beside every score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data.image_set import ImageSet, Item
from evaluation.runner import Measurement
from quickstart.judge import THRESHOLD, Judge, Verdict


class EmojiT2ISuite:
    """Judges `result` against meta["scene"]; implements evaluation.runner.Suite.

    object_right: the judge sees exactly the requested objects. objects_found: a rate over the requested objects, each
    seen or not. relation_right, for two objects: both are seen, and the first is to the left of or above the second as
    requested. background_right: the judge sees the requested colour.
    """

    name = "emoji_t2i"
    roles = ("result",)
    protocol: Mapping[str, Any] = {"object_right": "exact set of objects", "judge_threshold": THRESHOLD}

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.fingerprints = {"judge": judge.fingerprint}

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """The four scores of every item; groups: single, pair."""
        verdicts = self._judge(images.read_all(items, "result"))
        measurements = []
        for item, verdict in zip(items, verdicts, strict=True):
            scene = item.field("scene")
            asked = object_names(scene)
            measurements.append(
                Measurement(
                    values={
                        "object_right": asked == set(verdict.objects),
                        "objects_found": tuple(name in verdict.objects for name in sorted(asked)),
                        "relation_right": relation_right(scene, verdict),
                        "background_right": scene["background"] == verdict.background,
                    },
                    groups=("single" if len(scene["objects"]) == 1 else "pair",),
                    detail=verdict_detail(verdict),
                )
            )
        return measurements


def relation_right(scene: Mapping[str, Any], verdict: Verdict) -> float | bool:
    """Whether two objects stand as the scene's "relation" says ("left" or "above"); nan for a single object."""
    if len(scene["objects"]) == 1:
        return math.nan
    names = [thing["name"] for thing in scene["objects"]]
    (x_first, y_first), (x_second, y_second) = (verdict.centres[name] for name in names)
    right = x_first < x_second if scene["relation"] == "left" else y_first < y_second
    return right and set(names) <= set(verdict.objects)


def object_names(scene: Mapping[str, Any]) -> set[str]:
    """Names of a scene's objects."""
    return {str(thing["name"]) for thing in scene["objects"]}


def verdict_detail(verdict: Verdict) -> dict[str, Any]:
    """The judge's verdict for readers of per_item.jsonl: seen objects with scores, background."""
    scores = {name: round(verdict.object_scores[name], 4) for name in verdict.objects}
    return {"seen": scores, "background": verdict.background}
