"""The contract of every evaluation: image set in, scores.json and per_item.jsonl out."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from base.config import UserError
from data.image_set import ImageSet, Item, write_class_folders, write_image, write_manifest
from evaluation.runner import Measurement, estimates, evaluate
from evaluation.suites.reconstruction import ReconstructionSuite


class BrightnessSuite:
    name = "brightness"
    roles = ("result",)
    protocol: Mapping[str, Any] = {"level": "mean of uint8"}
    fingerprints: Mapping[str, str] = {"weights": "abc"}

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        levels = images.read_all(items, "result").float().mean((1, 2, 3)).tolist()
        return [
            Measurement({"level": level, "bright": level > 100}, groups=(item.field("kind"),))
            for item, level in zip(items, levels, strict=True)
        ]


def make_set(directory: Path, levels: Sequence[int]) -> Path:
    items = []
    for index, level in enumerate(levels):
        write_image(directory / f"{index}.png", torch.full((3, 8, 8), level, dtype=torch.uint8))
        kind = "even" if index % 2 == 0 else "odd"
        items.append(Item(str(index), {"result": f"{index}.png"}, {"kind": kind}))
    write_manifest(directory, items)
    return directory


def test_scores_hold_everything_needed_to_know_what_they_are(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", [50, 150, 250])
    scores = evaluate(BrightnessSuite(), images, tmp_path / "out", seed=7)
    assert scores == json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["n"] == 3 and scores["n_failed"] == 0 and not scores["partial"] and scores["seed"] == 7
    assert scores["scores"]["level"]["mean"] == 150
    assert scores["scores"]["bright"]["mean"] == pytest.approx(2 / 3)
    assert scores["groups"]["even"]["level"]["mean"] == 150 and scores["groups"]["odd"]["level"]["n"] == 1
    assert scores["fingerprints"] == {"weights": "abc"} and "torch" in scores["versions"]
    assert (tmp_path / "out" / scores["images"]).resolve() == images.resolve()
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0", "1", "2"]
    assert lines[1]["values"] == {"level": 150, "bright": True}


def test_missing_images_are_refused_unless_partial_is_allowed(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", [50, 150, 250])
    (images / "1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 items lack an image .*'1'"):
        evaluate(BrightnessSuite(), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    scores = evaluate(BrightnessSuite(), images, tmp_path / "out", allow_partial=True)
    assert (scores["n"], scores["n_failed"], scores["partial"]) == (2, 1, True)


def test_a_set_without_any_image_is_refused_even_as_partial(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", [50])
    (images / "0.png").unlink()
    with pytest.raises(UserError, match="1 of 1 items"):
        evaluate(BrightnessSuite(), images, tmp_path / "out", allow_partial=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{torn"], "manifest.jsonl:1"),
        (['{"key": "a"}'], "manifest.jsonl:1"),
        (['{"key": "a", "images": {}, "meta": {}}'] * 2, "'a' stands there twice"),
        ([], "names no items"),
    ],
)
def test_a_bad_manifest_is_named_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "manifest.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        ImageSet.open(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        ImageSet.open(tmp_path)


def test_unreadable_and_mismatched_images_are_named(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", [50, 150])
    (images / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png: no readable image"):
        evaluate(BrightnessSuite(), images, tmp_path / "out")
    write_image(images / "1.png", torch.zeros(3, 4, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="8 x 8 and 8 x 4"):
        evaluate(BrightnessSuite(), images, tmp_path / "out")


def test_undefined_values_count_in_neither_sum_nor_number() -> None:
    found = estimates([Measurement({"x": 1.0}), Measurement({"x": math.nan}), Measurement({"x": 3.0})])
    assert (found["x"]["mean"], found["x"]["n"]) == (2.0, 2)
    nothing = estimates([Measurement({"x": math.nan})])
    assert (nothing["x"]["mean"], nothing["x"]["n"]) == (None, 0)


def test_several_trials_of_an_item_count_one_by_one() -> None:
    found = estimates([Measurement({"found": (True, False)}), Measurement({"found": (True,)})])
    assert found["found"]["mean"] == pytest.approx(2 / 3) and found["found"]["n"] == 3


def test_reconstruction_suite_compares_each_image_with_its_own_original(tmp_path: Path) -> None:
    items = []
    for index, offset in enumerate((1, 10)):
        original = torch.full((3, 8, 8), 100 * (index + 1), dtype=torch.uint8)
        images = {"original": original, "result": original + offset}
        for role, pixels in images.items():
            write_image(tmp_path / f"{index}.{role}.png", pixels)
        items.append(Item(str(index), {role: f"{index}.{role}.png" for role in images}, {}))
    write_manifest(tmp_path, items)
    scores = evaluate(ReconstructionSuite(tmp_path / "store"), tmp_path, tmp_path / "out")
    expected = (20 * math.log10(255) + 20 * math.log10(25.5)) / 2
    assert scores["scores"]["psnr_db"]["mean"] == pytest.approx(expected, abs=1e-9)  # PNG is lossless


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    for folder, name in (("n02", "b.png"), ("n01", "a.png"), ("n02", "c.png")):
        write_image(tmp_path / "images" / folder / name, torch.zeros(3, 4, 4, dtype=torch.uint8))
    (tmp_path / "images" / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".cache").mkdir()
    assert write_class_folders(tmp_path / "images", tmp_path / "set", ("png", "jpeg")) == 2
    found = ImageSet.open(tmp_path / "images", tmp_path / "set/manifest.jsonl")
    assert [(item.key, item.meta["label"]) for item in found.items] == [
        ("n01/a.png", 0),
        ("n02/b.png", 1),
        ("n02/c.png", 1),
    ]
    assert found.read(found.items[0], "original").shape == (3, 4, 4)
    with pytest.raises(UserError, match="one folder per class"):
        write_class_folders(tmp_path / "images" / "n01", tmp_path / "other", ("png",))
