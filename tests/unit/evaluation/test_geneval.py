"""GenEval: every rule and boundary on given detections; the suite end to end with a scripted detector."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from base.config import UserError
from base.team import Team
from data.image_set import Item, write_image, write_manifest
from evaluation.judges.detector import NAMES, FoundObject
from evaluation.metrics.geneval import Detection, check_metadata, relations, verdict
from evaluation.metrics.interval import mean_of_means
from evaluation.runner import evaluate
from evaluation.suites.geneval import GenEvalSuite

BOX = (10.0, 10.0, 30.0, 30.0)
DOG = {"class": "dog", "count": 1}


def dog(
    score: float = 0.95, box: tuple[float, float, float, float] = BOX, colour: str | None = None
) -> Detection:
    return Detection("dog", score, box, colour)


def cat(
    score: float = 0.95, box: tuple[float, float, float, float] = BOX, colour: str | None = None
) -> Detection:
    return Detection("cat", score, box, colour)


def meta(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo of a thing"}


SINGLE = meta("single_object", DOG)
TWO = meta("two_object", DOG, {"class": "cat", "count": 1})
COUNT = meta("counting", {"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}])
COLOUR = meta("colors", {**DOG, "color": "red"})
ATTRIBUTES = meta("color_attr", {**DOG, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"})
POSITION = meta("position", {"class": "cat", "count": 1}, {**DOG, "position": ["left of", 0]})
JUST_ABOVE = float(np.nextafter(np.float32(0.3), np.float32(1)))
LEFT, RIGHT = (0.0, 10.0, 20.0, 30.0), (60.0, 10.0, 80.0, 30.0)


@pytest.mark.parametrize(
    ("metadata", "detections", "correct"),
    [
        (SINGLE, [dog()], True),
        (SINGLE, [], False),
        (SINGLE, [cat()], False),
        (SINGLE, [dog(), dog(), cat()], True),  # more is no mistake without an exclusion
        (SINGLE, [dog(0.3)], False),  # more than, not at least
        (SINGLE, [dog(float(np.float32(0.3)))], False),  # the official comparison is in fp32
        (SINGLE, [dog(JUST_ABOVE)], True),
        (TWO, [dog(), cat()], True),
        (TWO, [dog(), dog()], False),
        (COUNT, [dog(0.95), dog(0.91)], True),
        (COUNT, [dog(0.95), dog(0.9)], False),
        (COUNT, [dog(0.95), dog(0.91), dog(0.92)], False),
        (COUNT, [dog(0.95), dog(0.91), dog(0.9)], True),  # an unsure third does not count
        (COLOUR, [dog(colour="red")], True),
        (COLOUR, [dog(colour="blue")], False),
        (COLOUR, [dog(0.9, colour="blue"), dog(0.8, colour="red")], False),  # the surest one's colour
        (ATTRIBUTES, [dog(colour="red"), cat(colour="blue")], True),
        (ATTRIBUTES, [dog(colour="blue"), cat(colour="red")], False),
        (POSITION, [dog(box=LEFT), cat(box=RIGHT)], True),
        (POSITION, [dog(box=RIGHT), cat(box=LEFT)], False),
        (POSITION, [dog(box=LEFT)], False),
    ],
)
def test_a_verdict_for_every_task(
    metadata: dict[str, Any], detections: list[Detection], correct: bool
) -> None:
    found, reasons = verdict(metadata, detections)
    assert found is correct and bool(reasons) is not correct


def test_a_class_keeps_its_sixteen_surest() -> None:
    sure = [dog(0.99) for _ in range(16)]
    wanted = meta("counting", {"class": "dog", "count": 16}, exclude=[{"class": "dog", "count": 17}])
    assert verdict(wanted, [*sure, dog(0.95)]) == (True, [])


def test_colour_is_asked_of_all_that_the_count_names() -> None:
    two_red = meta("colors", {"class": "dog", "count": 2, "color": "red"})
    assert verdict(two_red, [dog(0.9, colour="red"), dog(0.8, colour="red"), dog(0.7, colour="blue")])[0]
    assert not verdict(two_red, [dog(0.9, colour="red"), dog(0.8, colour="blue"), dog(0.7, colour="red")])[0]


def at(x: float, y: float, size: float = 20.0) -> Detection:
    return dog(box=(x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def test_positions_hold_beyond_half_of_the_normalised_offset() -> None:
    # Sizes of 20 px: a tenth of both is 4 px. (|dx| - 4) / |offset| > 1/2 on the axis: |dx| > 8.
    assert relations(at(-8.0, 0), at(0, 0)) == set()
    assert relations(at(-8.001, 0), at(0, 0)) == {"left of"}
    assert relations(at(8.001, 0), at(0, 0)) == {"right of"}
    assert relations(at(0, -8.001), at(0, 0)) == {"above"}  # y points down
    assert relations(at(0, 8.001), at(0, 0)) == {"below"}


def test_positions_can_hold_in_two_directions_or_in_none() -> None:
    # On the diagonal (d - 4) / (d sqrt 2) > 1/2 where d > 4 sqrt 2 / (sqrt 2 - 1) = 13.657.
    edge = 4 * math.sqrt(2) / (math.sqrt(2) - 1)
    assert relations(at(-edge - 0.01, -edge - 0.01), at(0, 0)) == {"left of", "above"}
    assert relations(at(-edge + 0.01, -edge + 0.01), at(0, 0)) == set()
    assert relations(at(0, 0), at(0, 0)) == set()  # no offset: no division by zero
    assert relations(at(-4.0005, 0), at(0, 0)) == set()  # less than 1e-3 px beyond the slack


def test_a_position_needs_its_target_to_be_matched() -> None:
    red_cat = meta(
        "position", {"class": "cat", "count": 1, "color": "red"}, {**DOG, "position": ["left of", 0]}
    )
    correct, reasons = verdict(red_cat, [dog(box=LEFT), cat(box=RIGHT, colour="blue")])
    assert not correct and "no target for dog to be left of" in reasons


def test_unknown_tags_are_refused() -> None:
    with pytest.raises(UserError, match="GenEval has single_object"):
        verdict({"tag": "single", "include": []}, [])


def test_mean_of_means_weighs_groups_alike_and_adds_their_variances() -> None:
    found = mean_of_means([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert found.mean == pytest.approx((0.5 + 2 / 3) / 2) and found.n == 7
    variance = (1 / 3 / 4 + 1 / 3 / 3) / 4
    assert found.high - found.mean == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)
    assert math.isnan(mean_of_means([[1.0], []]).mean) and math.isnan(mean_of_means([[1.0], [0.0]]).low)


class ScriptedDetector:
    """Level of the image's first pixel -> objects; counts its calls."""

    fingerprint = "detector"
    protocol: ClassVar = {"network": "scripted"}

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image: Tensor) -> list[FoundObject]:
        self.calls += 1
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[2:6, 2:6] = True
        names = {0: [], 1: ["dog"], 2: ["dog", "cat"]}[int(image[0, 0, 0])]
        return [FoundObject(name, 0.95, (2.0, 2.0, 6.0, 6.0), mask) for name in names]


class ScriptedColours:
    fingerprint = "colours"
    protocol: ClassVar = {"network": "scripted"}

    def __call__(self, image: Tensor, objects: Sequence[FoundObject]) -> list[str]:
        return ["red" for _ in objects]


def make_set(directory: Path) -> Path:
    """Three prompts of two tasks, two images each."""
    items = []
    for prompt, (metadata, levels) in enumerate([(SINGLE, (1, 0)), (COLOUR, (1, 1)), (ATTRIBUTES, (2, 1))]):
        for number, level in enumerate(levels):
            key = f"{prompt:05d}-{number}"
            write_image(directory / f"{key}.png", torch.full((3, 8, 8), level, dtype=torch.uint8))
            items.append(Item(key, {"result": f"{key}.png"}, {**metadata, "prompt": f"a photo of {prompt}"}))
    write_manifest(directory, items)
    return directory


def test_the_suite_gives_tasks_overall_and_reasons_and_detects_once(tmp_path: Path) -> None:
    images, detector = make_set(tmp_path / "images"), ScriptedDetector()
    suite = GenEvalSuite(detector, ScriptedColours(), tmp_path / "store")
    scores = evaluate(suite, images, tmp_path / "out")
    rates = {group: found["correct"]["mean"] for group, found in scores["groups"].items()}
    assert rates == {"single_object": 0.5, "colors": 1.0, "color_attr": 0.0}
    overall = scores["scores"]["geneval"]
    assert (
        overall["mean"] == pytest.approx(0.5) and "without two_object, counting, position" in overall["note"]
    )
    assert "3 prompts with 2 images; GenEval has 553 with 4" in overall["note"]
    assert scores["scores"]["prompts_with_a_right_image"]["mean"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    assert lines[4]["detail"]["reasons"] == ["expected 1 blue cat, found red"]
    assert detector.calls == 6
    evaluate(suite, images, tmp_path / "again")
    assert detector.calls == 6
    assert (tmp_path / "again/scores.json").read_bytes() == (tmp_path / "out/scores.json").read_bytes()


def test_a_new_image_is_detected_anew_and_ranks_share(tmp_path: Path) -> None:
    images, detectors = make_set(tmp_path / "images"), [ScriptedDetector() for _ in range(2)]
    for rank in (1, 0):
        suite = GenEvalSuite(detectors[rank], ScriptedColours(), tmp_path / "store")
        evaluate(suite, images, tmp_path / "out", team=Team(rank, 2))
    assert [detector.calls for detector in detectors] == [3, 3]
    write_image(images / "00000-1.png", torch.full((3, 8, 8), 1, dtype=torch.uint8))
    detector = ScriptedDetector()
    suite = GenEvalSuite(detector, ScriptedColours(), tmp_path / "store")
    scores = evaluate(suite, images, tmp_path / "new")
    assert detector.calls == 1 and scores["groups"]["single_object"]["correct"]["mean"] == 1


def test_rewritten_prompts_give_a_score_of_their_own_name(tmp_path: Path) -> None:
    write_image(tmp_path / "set/0.png", torch.ones(3, 8, 8, dtype=torch.uint8))
    item = Item("0", {"result": "0.png"}, {**SINGLE, "prompt": "A brown dog stands on a lawn."})
    write_manifest(tmp_path / "set", [item])
    suite = GenEvalSuite(ScriptedDetector(), ScriptedColours(), tmp_path / "store")
    scores = evaluate(suite, tmp_path / "set", tmp_path / "out")["scores"]
    assert scores["geneval_rewritten"]["mean"] == 1 and "geneval" not in scores


def test_items_without_metadata_are_one_clear_line(tmp_path: Path) -> None:
    write_image(tmp_path / "set/0.png", torch.ones(3, 8, 8, dtype=torch.uint8))
    write_manifest(tmp_path / "set", [Item("0", {"result": "0.png"}, {"prompt": "a dog"})])
    with pytest.raises(UserError, match="item '0': its meta has no 'tag'"):
        evaluate(
            GenEvalSuite(ScriptedDetector(), ScriptedColours(), tmp_path), tmp_path / "set", tmp_path / "out"
        )


def test_names_are_cocos_eighty() -> None:
    assert len(NAMES) == len(set(NAMES)) == 80
    assert (NAMES[0], NAMES[9], NAMES[64], NAMES[79]) == (
        "person",
        "traffic light",
        "computer mouse",
        "toothbrush",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"tag": None},
        {"tag": ["counting"]},
        {"include": 3},
        {"include": ["dog"]},
        {"include": [{"class": "dog", "count": "2"}]},
        {"include": [{"class": ["dog"], "count": 1}]},
        {"include": [{"class": "dog", "count": 1, "position": ["left of", 7]}]},
        {"include": [{"class": "dog", "count": 1, "position": "left"}]},
        {"exclude": [{"class": "dog"}]},
    ],
)
def test_metadata_of_another_shape_is_refused_before_anything_is_detected(change: dict[str, Any]) -> None:
    good = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": None}
    check_metadata(good, "item 'a'")
    with pytest.raises(UserError, match=r"item 'a': |tag "):
        check_metadata({**good, **change}, "item 'a'")
