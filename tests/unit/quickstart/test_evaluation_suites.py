"""What counts as a right drawing and a right edit, with a judge whose answers are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from base.config import UserError
from data.image_set import ImageSet, Item, write_image, write_manifest
from evaluation.runner import evaluate
from quickstart.judge import Judge, Verdict
from quickstart.suites.edits import EmojiEditSuite, kept_pixels
from quickstart.suites.text_to_image import EmojiT2ISuite

LEFT, RIGHT = (2, 8, 14, 20), (18, 8, 30, 20)


class ScriptedJudge:
    """Answers in order, whatever it is shown."""

    fingerprint = "scripted"

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = verdicts

    def __call__(self, pixels: Tensor) -> list[Verdict]:
        assert len(pixels) == len(self.verdicts)
        return list(self.verdicts)


def scripted(*verdicts: Verdict) -> Judge:
    return cast(Judge, ScriptedJudge(*verdicts))


def verdict(centres: Mapping[str, tuple[float, float]], background: str = "red") -> Verdict:
    places = {"dog": (0.0, 0.0), "cat": (0.0, 0.0), **centres}
    return Verdict(tuple(centres), dict.fromkeys(places, 0.9), places, background)


def scene(*objects: tuple[str, tuple[int, int, int, int]], background: str = "red") -> dict[str, Any]:
    placed = [{"name": name, "box": list(box)} for name, box in objects]
    return {"objects": placed, "background": background, "relation": "left" if len(objects) == 2 else None}


def t2i_values(tmp_path: Path, asked: dict[str, Any], answer: Verdict) -> Mapping[str, Any]:
    write_image(tmp_path / "0.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    item = Item("0", {"result": "0.png"}, {"scene": asked})
    write_manifest(tmp_path, [item])
    (measurement,) = EmojiT2ISuite(scripted(answer)).measure(ImageSet.open(tmp_path), [item])
    return measurement.values


PAIR = scene(("dog", LEFT), ("cat", RIGHT))


@pytest.mark.parametrize(
    ("asked", "answer", "object_right", "found", "relation_right"),
    [
        (PAIR, {"dog": (8, 14), "cat": (24, 14)}, True, (True, True), True),
        (PAIR, {"dog": (24, 14), "cat": (8, 14)}, True, (True, True), False),
        (PAIR, {"dog": (8, 14)}, False, (False, True), False),
        (PAIR, {"dog": (8, 14), "cat": (24, 14), "fox": (1, 1)}, False, (True, True), True),
        (scene(("dog", LEFT)), {"dog": (8, 14)}, True, (True,), None),
        (scene(("dog", LEFT)), {}, False, (False,), None),
    ],
    ids=["right", "swapped", "one missing", "one too many", "single", "nothing seen"],
)
def test_objects_are_right_only_as_an_exact_set(
    tmp_path: Path,
    asked: dict[str, Any],
    answer: dict[str, tuple[float, float]],
    object_right: bool,
    found: tuple[bool, ...],
    relation_right: bool | None,
) -> None:
    values = t2i_values(tmp_path, asked, verdict(answer))
    assert values["object_right"] is object_right
    assert values["objects_found"] == found  # in the order of names: cat, dog
    if relation_right is None:
        assert values["relation_right"] != values["relation_right"]  # nan: there is no relation
    else:
        assert values["relation_right"] is relation_right


def test_background_is_judged_apart_from_objects(tmp_path: Path) -> None:
    values = t2i_values(tmp_path, scene(("dog", LEFT)), verdict({"dog": (8, 14)}, background="blue"))
    assert values["object_right"] is True and values["background_right"] is False


def test_an_item_without_scene_is_one_clear_line(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", torch.zeros(3, 32, 32, dtype=torch.uint8))
    item = Item("0", {"result": "0.png"}, {"caption": "a dog"})
    write_manifest(tmp_path, [item])
    with pytest.raises(UserError, match="item '0': its meta has no 'scene'"):
        EmojiT2ISuite(scripted(verdict({}))).measure(ImageSet.open(tmp_path), [item])


def draw(described: dict[str, Any]) -> Tensor:
    """uint8 [3, 32, 32]: a flat background with flat discs of 8 px inside the 12 px boxes."""
    levels = {"red": 10, "blue": 200, "dog": 80, "cat": 120}
    image = torch.full((3, 32, 32), levels[described["background"]], dtype=torch.uint8)
    for thing in described["objects"]:
        x0, y0, x1, y1 = thing["box"]
        image[:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = levels[thing["name"]]
    return image


def test_a_replaced_object_leaves_all_outside_its_box_to_keep() -> None:
    before, after = PAIR, scene(("cat", LEFT), ("cat", RIGHT))
    kept = kept_pixels(draw(before), draw(after), before, after)
    assert not kept[8:20, 2:14].any()
    assert kept.sum() == 32 * 32 - 12 * 12


def test_a_new_background_leaves_the_objects_to_keep() -> None:
    before, after = PAIR, {**PAIR, "background": "blue"}
    kept = kept_pixels(draw(before), draw(after), before, after)
    assert kept[10:18, 4:12].all() and kept[10:18, 20:28].all()
    assert kept.sum() == 2 * 8 * 8


def test_edit_suite_asks_for_the_change_and_for_the_rest(tmp_path: Path) -> None:
    before, after = scene(("dog", LEFT)), scene(("cat", LEFT))
    source, target = draw(before), draw(after)
    spoiled = target.clone()
    spoiled[:, 24:] += 50
    items = []
    for key, result in (("clean", target), ("spoiled", spoiled), ("ignored", source)):
        images = {"source": source, "target": target, "result": result}
        for role, pixels in images.items():
            write_image(tmp_path / f"{key}.{role}.png", pixels)
        meta = {"kind": "replace", "source_scene": before, "target_scene": after}
        items.append(Item(key, {role: f"{key}.{role}.png" for role in images}, meta))
    write_manifest(tmp_path, items)
    judge = scripted(verdict({"cat": (8, 14)}), verdict({"cat": (8, 14)}), verdict({"dog": (8, 14)}))
    clean, spoiled_found, ignored = EmojiEditSuite(judge).measure(ImageSet.open(tmp_path), items)
    assert clean.values["change_done"] is True and clean.values["psnr_outside_db"] == 100.0
    assert spoiled_found.values["change_done"] is True
    assert cast(float, spoiled_found.values["psnr_outside_db"]) < 25
    assert ignored.values["change_done"] is False and ignored.values["psnr_outside_db"] == 100.0
    scores = evaluate(EmojiEditSuite(judge), tmp_path, tmp_path / "out")
    assert scores["groups"]["replace"]["change_done"]["n"] == 3
    assert scores["fingerprints"] == {"judge": "scripted"}
