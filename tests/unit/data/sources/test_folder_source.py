"""Folders of images: captions beside them or in a listing, labels, edits; nothing from outside the folder."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from base.config import UserError
from data.shards import ShardDataset
from data.sources.base import BadItemError, InUnits
from data.sources.image_folder import FolderSource
from data.sources.prepare import Preparation
from data.sources.write import write_sources


def write_image(path: Path, kind: str = "png", color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), color).save(buffer, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    write_image(root / "a.png")
    write_image(root / "b.jpg", "jpeg")
    write_image(root / "deep/c.WEBP", "webp")
    for name in ("a.txt", "b.txt", "deep/c.txt"):
        (root / name).write_text(f" picture {name}\n")
    return root


def meta(source: FolderSource, index: int) -> dict[str, Any]:
    return dict(json.loads(source.sample(index).parts["json"]))


def listing(images: Path, *lines: dict[str, Any] | str) -> FolderSource:
    path = images.parent / "listing.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    return FolderSource(images, path)


def reason(source: FolderSource, index: int = 0) -> str:
    with pytest.raises(BadItemError) as error:
        source.sample(index)
    assert error.value.key == f"image-{index:09d}"
    return error.value.reason


def test_captions_lie_beside_the_images(images: Path) -> None:
    source = FolderSource(images)
    assert len(source) == 3
    assert [meta(source, index) for index in range(3)] == [
        {"caption": "picture a.txt", "file": "a.png"},
        {"caption": "picture b.txt", "file": "b.jpg"},
        {"caption": "picture deep/c.txt", "file": "deep/c.WEBP"},
    ]
    assert source.sample(1).parts["jpg"] == (images / "b.jpg").read_bytes()
    assert set(source.sample(2).parts) == {"json", "webp"}


def test_json_beside_an_image_comes_first_and_its_fields_are_kept(images: Path) -> None:
    (images / "a.json").write_text(json.dumps({"captions": {"alt": "one", "llava": " "}, "url": "u"}))
    (images / "b.json").write_text(json.dumps({"caption": None, "width": 20}))  # as img2dataset writes it
    source = FolderSource(images)
    assert meta(source, 0) == {"captions": {"alt": "one"}, "url": "u", "file": "a.png"}
    assert meta(source, 1) == {"caption": "picture b.txt", "width": 20, "file": "b.jpg"}


def test_labels_are_the_folders_in_sorted_order(images: Path) -> None:
    write_image(images / "apple/x.png")
    source = FolderSource(images, labels=True)
    assert len(source) == 4
    assert reason(source, 0) == "no class: a.png lies in no folder below images"
    assert meta(source, 1) == {"label": 0, "class": "apple", "file": "apple/x.png"}
    assert reason(source, 2).startswith("no class: b.jpg")
    assert meta(source, 3) == {"label": 1, "class": "deep", "file": "deep/c.WEBP"}


def test_folders_are_entered_through_links_and_a_circle_is_refused_by_name(images: Path) -> None:
    """A hundred classes of ImageNet are often a folder of links."""
    subset = images.parent / "subset"
    subset.mkdir()
    (subset / "deep").symlink_to(images / "deep")
    write_image(images.parent / "other/x.png")
    (subset / "other").symlink_to("../other")
    files = [
        meta(source, index)["file"]
        for source in [FolderSource(subset, labels=True)]
        for index in range(len(source))
    ]
    assert files == ["deep/c.WEBP", "other/x.png"]
    for name, place, to in (
        ("self", subset / "self", "self"),
        ("up", images / "deep/up", images / "deep"),  # back to where it lies
        ("round", images.parent / "other/round", subset),
        ("above", subset / "above", "/"),
    ):
        place.symlink_to(to)
        with pytest.raises(UserError, match=f"{name}: a circle of links"):
            FolderSource(subset)
        place.unlink()
    (subset / "folder.png").mkdir()  # no image, whatever its name
    with pytest.raises(UserError, match=r"folder.png: a class folder without an image"):
        FolderSource(subset, labels=True)
    assert len(FolderSource(subset)) == 2


def test_folder_that_cannot_be_listed_is_not_left_out(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"deep: cannot be read \(Permission denied\)"):
        FolderSource(images)


def test_what_json_cannot_hold_or_a_tokenizer_read_is_left_out(images: Path) -> None:
    line = '{"file": "a.png", "caption": "smile \\ud83d", "score": NaN, "all": [1.5, Infinity, 1e999], "none": null}'
    payload = listing(images, line).sample(0).parts["json"]
    assert json.loads(payload, parse_constant=pytest.fail) == {
        "file": "a.png",
        "caption": "smile ?",
        "all": [1.5, None, None],
    }


def test_listing_gives_order_captions_and_further_fields(images: Path) -> None:
    source = listing(
        images,
        {"file": "deep/c.WEBP", "caption": "a\u2028b"},  # a separator that is no end of a line
        {"file": "a.png", "captions": ["one", "", "two"], "aesthetic": 5.5},
        {"file": "b.jpg", "captions": {"alt": "x", "long": "y"}},
    )
    assert len(source) == 3
    assert [meta(source, index) for index in range(3)] == [
        {"file": "deep/c.WEBP", "caption": "a\u2028b"},
        {"file": "a.png", "captions": ["one", "two"], "aesthetic": 5.5},
        {"file": "b.jpg", "captions": {"alt": "x", "long": "y"}},
    ]


def test_listing_of_edits_gives_source_target_and_instructions(images: Path) -> None:
    target = write_image(images / "target.jpg", "jpeg", "blue")
    source = listing(
        images,
        {"source": "a.png", "target": "target.jpg", "instruction": "make it blue", "task": "colour"},
        {"source": "a.png", "target": "target.jpg", "instructions": ["blue it", "turn blue"]},
        {"source": "a.png", "target": "target.jpg", "caption": "no instruction"},
        {"target": "target.jpg", "instruction": "x"},
        {"source": "a.png", "target": "gone.jpg", "instruction": "x"},
    )
    sample = source.sample(0)
    assert sample.parts["source.png"] == (images / "a.png").read_bytes()
    assert sample.parts["target.jpg"] == target
    assert meta(source, 0) == {
        "source": "a.png",
        "target": "target.jpg",
        "instructions": ["make it blue"],
        "task": "colour",
    }
    assert meta(source, 1)["instructions"] == ["blue it", "turn blue"]
    assert reason(source, 2).startswith("no instruction: listing.jsonl: entry 3")
    assert reason(source, 3).startswith("bad line: listing.jsonl: entry 4")
    assert reason(source, 4) == "unreadable image: gone.jpg: No such file or directory"


def test_listing_of_edits_may_have_several_sources_and_targets(images: Path) -> None:
    first, second = (images / "a.png").read_bytes(), (images / "b.jpg").read_bytes()
    source = listing(
        images,
        {"source": ["b.jpg", "a.png"], "target": "a.png", "instruction": "both"},
        {"source": ["a.png"], "target": ["b.jpg", "a.png"], "instruction": "two answers"},
        {"source": [], "target": "a.png", "instruction": "x"},
        {"source": ["a.png", 3], "target": "a.png", "instruction": "x"},
        {"source": ["a.png"] * 4, "target": ["b.jpg"] * 4, "instruction": "x"},
        {"source": ["a.png", "../x.png"], "target": "a.png", "instruction": "x"},
        {"source": ["a.png", "b.jpg"], "target": "a.png"},
    )
    both, answers = source.sample(0), source.sample(1)
    assert {"source0.jpg": second, "source1.png": first, "target.png": first}.items() <= both.parts.items()
    assert {"source.png": first, "target0.jpg": second, "target1.png": first}.items() <= answers.parts.items()
    assert meta(source, 0) == {"source": ["b.jpg", "a.png"], "target": "a.png", "instructions": ["both"]}
    assert reason(source, 2).endswith("entry 3: expected one, or source and target; found target")
    assert reason(source, 3).endswith('entry 4: expected "source1" to be a path below the folder')
    assert reason(source, 4).endswith("entry 5: 8 images, a sample holds at most 7")
    assert reason(source, 5).startswith("outside the folder: '../x.png'")
    assert reason(source, 6).startswith("no instruction: listing.jsonl: entry 7")


def test_listing_of_interleaved_samples_names_files_in_its_splits(images: Path) -> None:
    good = [{"text": " a\ud800 "}, {"image": "b.jpg", "target": True}, {"image": "b.jpg"}, {"image": "a.png"}]
    source = listing(
        images,
        json.dumps({"splits": good, "caption": "left out", "origin": "x", "note": None}),
        {"splits": [{"text": "a"}]},
        {"splits": [{"text": "a"}, {"image": "a.png"}]},
        {"splits": [{"text": "a"}, {"image": "a.png", "target": True}, {"image": 3}]},
        {"splits": [{"text": "  "}, {"image": "a.png", "target": True}]},
        {"splits": [{"text": "a"}, {"image": "gone.png", "target": True}]},
        {"splits": "a.png"},
        {"file": "a.png", "caption": "one image", "splits": "of another program"},
    )
    parts = source.sample(0).parts
    assert parts["image0.jpg"] == (images / "b.jpg").read_bytes()
    assert parts["image1.png"] == (images / "a.png").read_bytes()
    assert sorted(parts) == ["image0.jpg", "image1.png", "json"]
    assert meta(source, 0) == {
        "files": ["b.jpg", "a.png"],
        "origin": "x",
        "splits": [
            {"text": "a?"},
            {"image": "image0", "target": True},
            {"image": "image0"},
            {"image": "image1"},
        ],
    }
    assert reason(source, 1).startswith(
        "bad line: listing.jsonl: entry 2: expected one, or source and target"
    )
    assert reason(source, 2).startswith(
        'bad splits: listing.jsonl: entry 3: "splits" has no image with "target"'
    )
    assert reason(source, 3).startswith('bad splits: listing.jsonl: entry 4: "splits" entry 2 is neither')
    assert reason(source, 4).startswith('bad splits: listing.jsonl: entry 5: "splits" entry 0 is neither')
    assert reason(source, 5) == "unreadable image: gone.png: No such file or directory"
    assert reason(source, 6).startswith('bad line: listing.jsonl: entry 7: expected "file" to be a path')
    assert sorted(source.sample(7).parts) == ["json", "png"]


@pytest.mark.parametrize("name", ["../secret.png", "deep/../../secret.png", "link.png", "linked/secret.png"])
def test_listing_cannot_lead_out_of_the_folder(images: Path, name: str) -> None:
    write_image(images.parent / "secret.png")
    (images / "link.png").symlink_to("../secret.png")
    (images / "linked").symlink_to("..")
    (images / "loop").symlink_to("loop")
    for entry in (
        {"file": name},
        {"file": str(images.parent / "secret.png")},
        {"file": str(images / "a.png")},
    ):
        assert reason(listing(images, {**entry, "caption": "x"})).startswith("outside the folder: ")
    edit = {"source": "a.png", "target": name, "instruction": "x"}
    assert reason(listing(images, edit)).startswith("outside the folder: ")
    assert reason(listing(images, {"file": "loop", "caption": "x"}))
    (images / "inside.png").symlink_to("a.png")
    assert listing(images, {"file": "inside.png", "caption": "x"}).sample(0).parts["png"]


@pytest.mark.parametrize(
    "line, kind",
    [
        ("not json", "bad json"),
        ("[1]", "bad json"),
        ("[" * 100_000, "bad json"),
        ({"file": "a.png"}, "no caption"),
        ({"file": "a.png", "caption": " "}, "no caption"),
        ({"file": "a.png", "caption": 3}, "no caption"),
        ({"file": "a.png", "captions": []}, "no caption"),
        ({"file": 3, "caption": "x"}, "bad line"),
        ({"file": "", "caption": "x"}, "bad line"),
        ({"caption": "x"}, "bad line"),
        ({"file": "a.txt", "caption": "x"}, "unreadable image"),
        ({"file": "deep", "caption": "x"}, "unreadable image"),
        ({"file": "a\0.png", "caption": "x"}, "outside the folder"),
    ],
)
def test_bad_entry_is_named(images: Path, line: Any, kind: str) -> None:
    source = listing(images, {"file": "a.png", "caption": "x"}, line)
    assert source.sample(0)
    assert reason(source, 1).startswith(f"{kind}: ")
    if kind != "unreadable image" and kind != "outside the folder":
        assert "listing.jsonl: entry 2" in reason(source, 1)


def test_missing_captions_and_broken_files_are_named(images: Path) -> None:
    (images / "a.txt").unlink()
    (images / "b.txt").write_bytes(b"\xff")
    (images / "deep/c.WEBP").write_bytes(b"")
    source = FolderSource(images)
    assert reason(source, 0) == (
        "no caption: a.png: none in a .txt or .json beside it (No such file or directory)"
    )
    assert reason(source, 1) == "no caption: b.jpg: none in a .txt or .json beside it (not UTF-8)"
    assert reason(source, 2) == "unreadable image: deep/c.WEBP: no bytes"


def test_folder_becomes_shards_with_every_image_accounted_for(images: Path, tmp_path: Path) -> None:
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[:300])
    (images / "deep/c.txt").unlink()
    source = InUnits(FolderSource(images), 2)
    preparation = Preparation(resolution=16, encoding="png")
    ledgers = write_sources({tmp_path / "out": source}, prepare=preparation)
    assert (
        str(ledgers[tmp_path / "out"]) == "read 3 = written 1 + rejected 2 (unreadable image 1, no caption 1)"
    )
    (sample,) = ShardDataset.open(tmp_path / "out").read([0])
    assert json.loads(sample.parts["json"]) == {
        "caption": "picture a.txt",
        "file": "a.png",
        "width": 20,
        "height": 30,
    }


def test_wrong_folders_are_one_line(images: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        FolderSource(images / "none")
    with pytest.raises(UserError, match="--labels needs one for each class"):
        FolderSource(images / "deep", labels=True)
    with pytest.raises(UserError, match="no such file"):
        FolderSource(images, images / "none.jsonl")
    with pytest.raises(UserError, match="not both"):
        FolderSource(images, images / "x", labels=True)
    (images.parent / "empty").mkdir()
    with pytest.raises(UserError, match="lists no image"):
        FolderSource(images.parent / "empty")
