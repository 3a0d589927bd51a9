"""Does an edited image show the requested change, and is everything else unchanged?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.image_set import ImageSet, Item
from evaluation.metrics.reconstruction import psnr_db
from evaluation.runner import Measurement
from quickstart.judge import THRESHOLD, Judge
from quickstart.suites.text_to_image import object_names, verdict_detail


class EmojiEditSuite:
    """Judges `result` against meta["target_scene"], and compares it with `source`; implements Suite.

    change_done: the judge sees exactly the target's objects and its background. psnr_outside_db: PSNR to the source
    over the pixels that `kept_pixels` names; nan, hence not counted, without such pixels.
    """

    name = "emoji_edit"
    roles = ("result", "source", "target")
    protocol: Mapping[str, Any] = {
        "change_done": "exact set of objects and background of the target scene",
        "psnr_outside_db": "uint8, to the source, where the true target equals the source "
        "and outside the boxes of changed objects; dB per image, mean of dB",
        "judge_threshold": THRESHOLD,
    }

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.fingerprints = {"judge": judge.fingerprint}

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """The scores of every item; groups: the kind of edit."""
        results, sources, targets = (images.read_all(items, role) for role in self.roles)
        kept = torch.stack(
            [
                kept_pixels(source, target, item.field("source_scene"), item.field("target_scene"))
                for item, source, target in zip(items, sources, targets, strict=True)
            ]
        )
        outside_db = psnr_db(results, sources, kept).tolist()
        measurements = []
        for item, verdict, outside in zip(items, self._judge(results), outside_db, strict=True):
            scene = item.field("target_scene")
            object_right = object_names(scene) == set(verdict.objects)
            background_right = scene["background"] == verdict.background
            measurements.append(
                Measurement(
                    values={
                        "change_done": object_right and background_right,
                        "object_right": object_right,
                        "background_right": background_right,
                        "psnr_outside_db": outside,
                    },
                    groups=(item.field("kind"),),
                    detail=verdict_detail(verdict),
                )
            )
        return measurements


def kept_pixels(
    source: Tensor, target: Tensor, source_scene: Mapping[str, Any], target_scene: Mapping[str, Any]
) -> Tensor:
    """Pixels that an edit must leave alone, bool [H, W].

    These pixels are equal in the true source and target (uint8 [3, H, W]) and lie outside the boxes of all
    objects that are in only one of the scenes. A new background thus leaves the inside of the kept objects; a replaced
    object leaves everything outside the old and the new object's box.
    """
    kept = (source == target).all(0)
    before, after = _placed(source_scene), _placed(target_scene)
    for _, (x0, y0, x1, y1) in before ^ after:
        kept[y0:y1, x0:x1] = False
    return kept


def _placed(scene: Mapping[str, Any]) -> set[tuple[str, tuple[int, int, int, int]]]:
    return {
        (str(thing["name"]), (int(x0), int(y0), int(x1), int(y1)))
        for thing in scene["objects"]
        for x0, y0, x1, y1 in [thing["box"]]
    }
