"""Names in lists, tables and manifests never lead out of their folder; links in a folder that a person names may."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from base import files
from base.config import UserError
from data.image_set import ImageSet, Item, write_class_folders, write_manifest
from data.shards import ShardDataset
from data.sources.base import InUnits
from data.sources.image_folder import FolderSource
from data.sources.write import write_sources
from evaluation.image_source import FileImages
from evaluation.prompt_sets import write_imgedit
from evaluation.reference import Reference
from generator.prompts import read_prompts
from launch import make_shards
from launch.runs import entry

SECRET = (1, 2, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a picture, beside a secret, and with every kind of link to it."""
    root = tmp_path / "given"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8), SECRET).save(tmp_path / "elsewhere" / "secret.png")
    Image.new("RGB", (8, 8), "red").save(root / "own.png")
    (root / "link.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (root / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (root / "round").symlink_to(root / "round")
    return root


LEADING_OUT = (
    "../elsewhere/secret.png",
    "sub/../../elsewhere/secret.png",
    "elsewhere/../elsewhere/secret.png",
    "{absolute}",
    "link.png",
    "elsewhere/secret.png",
    "round/secret.png",
    "own.png\0",
)


def listed(folder: Path, line: dict[str, object]) -> None:
    (folder / "list.jsonl").write_text(json.dumps(line) + "\n")
    source = FolderSource(folder, folder / "list.jsonl")
    (item,) = InUnits(source, 1).items(0)
    if isinstance(item, UserError):
        raise item


def image_set(folder: Path, name: str) -> ImageSet:
    write_manifest(folder, [Item("a", {"result": name}, {})])
    return ImageSet.open(folder)


def prompts(folder: Path, row: dict[str, object]) -> None:
    (folder / "p.jsonl").write_text(json.dumps({**row, "instruction": "fill it"}) + "\n")
    read_prompts(folder / "p.jsonl")


def imgedit(folder: Path, name: str) -> None:
    edits = {"a": {"id": name, "prompt": "fill it", "edit_type": "add"}}
    (folder / "edits.json").write_text(json.dumps(edits))
    write_imgedit(folder / "edits.json", folder, folder.parent / "out")
    (prompt,) = read_prompts(folder.parent / "out/prompts.jsonl")
    assert prompt.images[0].read_bytes() == (folder / name).read_bytes()


def shards(folder: Path, name: str) -> None:
    """Of a data set in whose manifest the only shard is called so."""
    if not (folder / "manifest.json").is_file():
        listing = folder.parent / "own.jsonl"
        listing.write_text('{"file": "own.png", "caption": "a"}\n')
        write_sources({folder: InUnits(FolderSource(folder, listing), 1)})
    tree = json.loads((folder / "manifest.json").read_text())
    if name != "own.png":
        tree["shards"][0]["name"] = name
        (folder / "manifest.json").write_text(json.dumps(tree))
    ShardDataset.open(folder)


READERS: dict[str, Callable[[Path, str], object]] = {
    "listing": lambda folder, name: listed(folder, {"file": name, "caption": "a"}),
    "edits": lambda folder, name: listed(folder, {"source": "own.png", "target": name, "instruction": "a"}),
    "several sources": lambda folder, name: listed(
        folder, {"source": ["own.png", name], "target": "own.png", "instruction": "a"}
    ),
    "splits": lambda folder, name: listed(
        folder, {"splits": [{"text": "a"}, {"image": name, "target": True}]}
    ),
    "image set": lambda folder, name: image_set(folder, name).read(
        image_set(folder, name).items[0], "result"
    ),
    "whole set": lambda folder, name: image_set(folder, name).missing(["result"]),
    "features": lambda folder, name: (
        FileImages.of_set(one := image_set(folder, name), one.items, "result").digest
    ),
    "reference": lambda folder, name: [image_set(folder, name), Reference.open(folder)],
    "prompts": lambda folder, name: prompts(folder, {"image": name}),
    "prompts of several images": lambda folder, name: prompts(folder, {"image": ["own.png", name]}),
    "ImgEdit": imgedit,
    "shards": shards,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_name_that_leads_out_is_refused_by_every_reader(
    read: Callable[[Path, str], object], folder: Path
) -> None:
    read(folder, "own.png")
    for written in LEADING_OUT:
        name = written.format(absolute=folder.parent / "elsewhere" / "secret.png")
        with pytest.raises(UserError) as error:
            read(folder, name)
        assert "\n" not in str(error.value), name
    for path in (folder.parent / "out").rglob("*.png"):
        assert Image.open(path).getpixel((0, 0)) != SECRET


def test_the_rule_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LEADING_OUT:
        with pytest.raises(UserError, match=r"leads out of .*given; name a file in it"):
            files.inside(folder, name.format(absolute="/etc/passwd"))
    for name in ("own.png", "sub/../own.png", "absent.png", str(folder / "own.png")):
        assert files.inside(folder, name) == folder / name
    assert files.inside(folder, "link.png", follow_links=True) == folder / "link.png"
    for name in (*LEADING_OUT[:3], "/etc/passwd"):
        with pytest.raises(UserError):
            files.inside(folder, name, follow_links=True)
    monkeypatch.chdir(folder)
    assert files.inside(".", "own.png").is_file()


def test_links_of_class_folders_that_a_person_names_are_followed(tmp_path: Path) -> None:
    """ImageNet is kept as folders of links; what lies in them was not named by a list."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "val/n01").mkdir(parents=True)
    (tmp_path / "val/n01/a.png").symlink_to(tmp_path / "a.png")
    write_class_folders(tmp_path / "val", tmp_path / "set", ["png"])
    manifest = tmp_path / "set/manifest.jsonl"
    images = ImageSet.open(tmp_path / "val", manifest, follow_links=True)
    assert images.read(images.items[0], "original").shape == (3, 8, 8)
    strict = ImageSet.open(tmp_path / "val", manifest)
    with pytest.raises(UserError, match=r"item 'n01/a\.png': 'n01/a\.png' leads out"):
        strict.read(strict.items[0], "original")


# --- make_shards folder


def shard(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    words = ["make_shards", "folder", "--processes", "1", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    return entry.run(make_shards.main, has_ranks=False)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """Images with captions; of five files that are read three lie elsewhere, one link stays inside."""
    root, other = tmp_path / "images", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    root.mkdir()
    for path in (root / "a.png", other / "deep/b.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    (other / "id_rsa").write_text("a private key")
    (other / "deep/b.txt").write_text("b")
    (other / "deep/notes.md").write_text("not read")
    (root / "a.txt").symlink_to(other / "id_rsa")
    (root / "more").symlink_to(other / "deep")
    (root / "c.png").symlink_to(root / "a.png")
    (root / "c.txt").write_text("c")
    return root


def test_what_links_bring_from_elsewhere_is_counted_in_the_summary(
    linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(monkeypatch, "--images", linked, "--out", tmp_path / "shards") == 0
    said = capsys.readouterr().out
    assert "read 4 = written 3 + rejected 1 (other file 1)" in said  # links are followed
    line = f"3 files lie outside {linked}, links lead there: a.txt, more/b.png, more/b.txt"
    assert line in said.splitlines()


def test_links_to_elsewhere_are_refused_where_that_is_asked_for(
    linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--images", linked, "--out", tmp_path / "shards", "--no-links-outside")
    assert shard(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 files lie outside" in line and "a.txt, more/b.png, more/b.txt; take the links out" in line
    assert not list((tmp_path / "shards").glob("*.tar"))
    for name in ("a.txt", "more"):
        (linked / name).unlink()
    (linked / "a.txt").write_text("a")
    assert shard(monkeypatch, *arguments) == 0
    assert "outside" not in capsys.readouterr().out


def test_more_than_three_are_told_by_the_first_three(tmp_path: Path) -> None:
    (tmp_path / "images/n1").mkdir(parents=True)
    (tmp_path / "n2").mkdir()
    for name in ("images/n1/a.png", *(f"n2/{letter}.png" for letter in "abcde")):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "images/n2").symlink_to(tmp_path / "n2")
    source = FolderSource(tmp_path / "images", labels=True)
    assert source.outside_line.endswith("links lead there: n2/a.png, n2/b.png, n2/c.png, ...")
    assert source.outside_line.startswith("5 files lie outside")
    assert len(source) == 6
