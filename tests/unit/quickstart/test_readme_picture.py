"""The picture of the quickstart: the first images of its sets, in their order; an unfinished run is one line."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from base.config import UserError
from data.image_set import Item, write_manifest
from quickstart import readme_picture

ROLES = {"reconstruction": ("original", "result"), "t2i": ("result",), "edit": ("source", "result")}


def make_set(root: Path, name: str, metas: list[dict[str, str]]) -> list[Path]:
    """An image set in which every image has a colour of its own; the files in order."""
    folder, items, made = root / readme_picture.IMAGES / name, [], []
    folder.mkdir(parents=True)
    for number, meta in enumerate(metas):
        images = {role: f"{number}.{role}.png" for role in ROLES[name]}
        for place, file in enumerate(images.values()):
            colour = (10 * number + 5, 100 * place + 20, 7 * list(ROLES).index(name))
            Image.new("RGB", (8, 8), colour).save(folder / file)
            made.append(folder / file)
        items.append(Item(f"{number}", images, meta))
    write_manifest(folder, items)
    return made


@pytest.fixture
def root(tmp_path) -> Path:
    make_set(tmp_path, "reconstruction", [{} for _ in range(8)])
    make_set(
        tmp_path, "t2i", [{"caption": f"a red apple and {n} dogs on a blue background"} for n in range(8)]
    )
    kinds = ["add", "add", "add", "remove", "replace", "skin", "background"]
    make_set(tmp_path, "edit", [{"kind": kind, "instruction": f"{kind} something"} for kind in kinds])
    return tmp_path


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.getcolors(1 << 24)}


def colour_of(root: Path, name: str, number: int, role: str) -> tuple[int, ...]:
    with Image.open(root / readme_picture.IMAGES / name / f"{number}.{role}.png") as image:
        return image.getpixel((0, 0))


def test_the_first_images_of_every_set_are_shown_and_no_others(root) -> None:
    found = colours(readme_picture.draw(root))
    for role in ROLES["reconstruction"]:
        shown = [colour_of(root, "reconstruction", n, role) in found for n in range(8)]
        assert shown == [True] * 6 + [False] * 2
    assert [colour_of(root, "t2i", n, "result") in found for n in range(8)] == [True] * 6 + [False] * 2


def test_every_kind_of_edit_is_shown_before_any_comes_twice(root) -> None:
    found = colours(readme_picture.draw(root))
    for role in ROLES["edit"]:
        shown = [colour_of(root, "edit", n, role) in found for n in range(7)]
        assert shown == [True, True, False, True, True, True, True], "the second `add` is the sixth edit"


def test_the_command_replaces_its_own_picture_only(root, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "pictures" / "quickstart.png"
    monkeypatch.setattr(sys, "argv", ["picture.py", "--root", str(root), "--out", str(out)])
    readme_picture.main()
    first = out.read_bytes()
    readme_picture.main()
    assert out.read_bytes() == first and len(first) < 100_000
    assert str(out) in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(out)
    with pytest.raises(UserError, match="no command of this project wrote it"):
        readme_picture.main()


def test_a_run_that_is_not_finished_is_one_line(tmp_path, root) -> None:
    (root / readme_picture.IMAGES / "edit" / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match=r"edit: no images there yet; finish the quickstart first"):
        readme_picture.draw(root)
