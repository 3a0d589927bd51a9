"""Image sets: a directory of images and manifest.jsonl, the input of every suite.

One line an item: {"key": unique name, "images": {role: file name, ...}, "meta": json of the sample}.
Roles: a suite judges `result`; `original`, `source` and `target` are references that a suite may ask for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from base import files
from base.config import UserError
from data.samples.captions import read_object
from data.samples.images import read_rgb_file
from data.sources.folder_walk import images_below, tell_passed_over
from data.sources.text_files import read_text, split_lines

MANIFEST_NAME = "manifest.jsonl"


@dataclass(frozen=True)
class Item:
    """One line of a manifest."""

    key: str
    images: Mapping[str, str]  # role -> file name inside the directory
    meta: Mapping[str, Any]  # the sample's json: caption or instruction, scene or scenes

    def field(self, name: str) -> Any:
        """meta[name]. Raises UserError: the sample has no such field."""
        if name not in self.meta:
            raise UserError(f"item '{self.key}': its meta has no '{name}', which this suite compares with")
        return self.meta[name]


@dataclass(frozen=True)
class ImageSet:
    """A directory of images with a manifest that says what each image was made for."""

    directory: Path
    items: tuple[Item, ...]
    follow_links: bool = False
    """Whether links may lead out of the folder. A set that was listed from an existing folder of images allows them."""

    @classmethod
    def open(
        cls, directory: str | Path, manifest: str | Path | None = None, *, follow_links: bool = False
    ) -> ImageSet:
        """Reads the manifest, by default the folder's own.

        Raises UserError: no manifest, a bad line, a repeated key, no items.
        """
        path = Path(directory) / MANIFEST_NAME if manifest is None else Path(manifest)
        if not path.is_file():
            raise UserError(f"{path}: no such file; an image set needs one line an item there")
        items: dict[str, Item] = {}
        for number, line in enumerate(split_lines(read_text(path)), start=1):
            if not line.strip():
                continue
            try:
                row = read_object(line.encode())
                item = Item(key=str(row["key"]), images=dict(row["images"]), meta=dict(row["meta"]))
                if not all(isinstance(name, str) for name in item.images.values()):
                    raise TypeError("images are names of files")
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"{path}:{number}: expected a JSON object with key, images and meta; write the line again"
                ) from None
            if item.key in items:
                raise UserError(f"{path}:{number}: key '{item.key}' stands there twice; keys must be unique")
            items[item.key] = item
        if not items:
            raise UserError(f"{path}: names no items; there is nothing to score")
        return cls(Path(directory), tuple(items.values()), follow_links)

    def path(self, item: Item, role: str) -> Path:
        """File of an item's image. Raises UserError: no file in this role, or a file outside the folder."""
        where = f"{self.directory / MANIFEST_NAME}: item '{item.key}'"
        if role not in item.images:
            raise UserError(f"{where} names no '{role}' image")
        try:
            return files.inside(self.directory, item.images[role], follow_links=self.follow_links)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def read(self, item: Item, role: str) -> Tensor:
        """uint8 [3, H, W]. Raises UserError: no such role, or a file that is no readable image."""
        pixels = np.array(read_rgb_file(self.path(item, role)))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def read_all(self, items: Sequence[Item], role: str) -> Tensor:
        """uint8 [N, 3, H, W]. Raises UserError as `read` does, or if sizes differ."""
        images = [self.read(item, role) for item in items]
        for item, image in zip(items, images, strict=True):
            if image.shape != images[0].shape:
                sizes = " and ".join(f"{i.shape[2]} x {i.shape[1]}" for i in (images[0], image))
                raise UserError(
                    f"{self.path(item, role)}: images of one set must be of one size, not {sizes}"
                )
        return torch.stack(images)

    def missing(self, roles: Iterable[str]) -> list[Item]:
        """Items with a file in one of `roles` that does not exist."""
        return [item for item in self.items if not all(self.path(item, role).is_file() for role in roles)]


def write_manifest(directory: str | Path, items: Iterable[Item]) -> None:
    """Writes manifest.jsonl beside the images. Call it last, so that a half-written set has no manifest."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    rows = [{"key": item.key, "images": dict(item.images), "meta": dict(item.meta)} for item in items]
    files.write_text(Path(directory) / MANIFEST_NAME, "".join(json.dumps(row) + "\n" for row in rows))


def write_class_folders(images: str | Path, out: str | Path, suffixes: Sequence[str]) -> int:
    """Writes to `out` the manifest of a folder with a folder for each class (ImageNet's validation set).

    Returns the number of classes.

    `original` is the file below `images`; meta.label is the index of its folder in the sorted list of folders. Raises
    UserError: no such folders, a folder without images.
    """
    found = images_below(Path(images), suffixes)
    labels = {name: label for label, name in enumerate(found.classes())}
    if not labels:
        raise UserError(f"{images}: holds no images in one folder per class ({', '.join(suffixes)})")
    inside = [name for name in found.names if "/" in name]
    tell_passed_over(images, sorted({*found.names, *dict(found.others)} - set(inside)))
    items = [Item(name, {"original": name}, {"label": labels[name.partition("/")[0]]}) for name in inside]
    write_manifest(out, items)
    return len(labels)


def write_image(path: str | Path, pixels: Tensor) -> None:
    """Saves uint8 [3, H, W] as PNG, atomically."""
    assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == 3
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.png")
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(temporary)
    temporary.replace(path)
