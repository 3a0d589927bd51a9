"""Pages show pictures of folders that belong to the scores or that a person named, whatever a scores.json names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data.image_set import Item, write_manifest
from launch import evaluate
from report import render_report

ESTIMATE = {"mean": 0.0, "low": None, "high": None, "n": 1}


def image_set(folder: Path, manifest: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    write_manifest(manifest or folder, [Item("a", {"result": "a.png"}, {"caption": "c"})])
    return folder


def scores(folder: Path, images: str, manifest: str | None = None) -> Path:
    """An item that failed, of a set that `images` names."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "suite": "geneval",
        "images": images,
        **({"manifest": manifest} if manifest else {}),
        "scores": {"correct": ESTIMATE},
        "groups": {},
        "n": 1,
        "n_failed": 0,
        "partial": False,
    }
    (folder / "scores.json").write_text(json.dumps(tree))
    line = {"key": "a", "values": {"correct": False}, "groups": [], "detail": {}}
    (folder / "per_item.jsonl").write_text(json.dumps(line))
    return folder


def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: object) -> str:
    out = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "report", *map(str, words), "--out", str(out)])
    evaluate.main()
    return out.read_text()


def test_a_set_below_or_beside_the_scores_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_set(tmp_path / "run/samples/t2i")
    image_set(tmp_path / "run/geneval/images")
    image_set(tmp_path / "beside")
    for folder, images in (
        ("run/geneval", "images"),
        ("alone", "../beside"),
        ("run/geneval", "../samples/t2i"),
    ):
        scores(tmp_path / folder, images)
        named = tmp_path / folder.partition("/")[0]
        assert "data:image/png" in page(monkeypatch, tmp_path, named), images


def test_another_folder_is_shown_only_where_the_person_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = image_set(tmp_path / "home/private")
    theirs = tmp_path / "home/downloads/theirs"
    write_manifest(theirs, [Item("a", {"result": "a.png"}, {"caption": "c"})])
    image_set(tmp_path / "home/downloads/photos", manifest=tmp_path / "elsewhere")
    (theirs / "link").symlink_to(private)
    (theirs / "circle").symlink_to("circle")
    for images, manifest in (
        ("../../private", None),
        (str(private), None),
        ("link", None),
        ("link", "manifest.jsonl"),
        ("../photos", "manifest.jsonl"),  # names pictures of a folder that is no image set
        (".", "../../private/manifest.jsonl"),
    ):
        html = page(monkeypatch, tmp_path, scores(theirs, images, manifest))
        where = os.path.normpath(theirs / images)
        assert (
            "data:image" not in html
            and f"its images are elsewhere; to show them, add --images {where}" in html
        )
    for images in ("circle", "a\0b", "../../private/a.png"):  # no sets
        html = page(monkeypatch, tmp_path, scores(theirs, images))
        assert "data:image" not in html and "images are elsewhere" not in html
    scores(theirs, "../../private")
    assert "data:image/png" in page(monkeypatch, tmp_path, theirs, "--images", private)


def test_the_page_of_a_run_shows_images_of_the_run(tmp_path: Path) -> None:
    for images, is_shown in (("../../samples", True), ("../../../private", False)):
        run = tmp_path / f"run-{is_shown}"
        image_set(scores(run / "evaluation/t2i", images) / images)
        html = render_report(run).read_text()
        assert ("data:image/png" in html) == is_shown
        assert (f"Its images are outside the run folder: {tmp_path / 'private'}" in html) != is_shown
