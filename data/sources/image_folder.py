"""A folder of images with captions, labels, edits or interleaved texts -> samples. File contents stay unchanged."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from base import files, limits
from base.config import UserError
from data.samples.captions import TEXT_FIELDS, read_object
from data.samples.images import IMAGE_PARTS, image_suffix, part_name
from data.samples.layouts import check_roles, is_interleaved, number_roles, read_splits
from data.shards import Sample
from data.sources.base import BadItemError
from data.sources.folder_walk import first_of, images_below
from data.sources.prepare import clean_splits, select_texts
from data.sources.text_files import decode_text, without_mark


class FolderSource:
    """The images below a folder. Implements data.sources.base.IndexedItems.

    - `listing`: a jsonl file with one sample a line, in this order: {"file": path below the folder, "caption": text},
      or "captions": a list, or an object of kind -> text. Edits: {"source": file, "target": file, "instruction": text},
      or "instructions": a list; source and target may be lists of files. Interleaved: {"splits": [{"text": text},
      {"image": file, "target": true}, ...]} as in data/samples/layouts.py, with files in place of roles. The sample's
      json holds the roles, and the files under "files". Other fields are kept, except null.
    - `labels`: every folder below `images` is a class, numbered in sorted order (ImageNet's layout). The sample's json
      holds the class's number and name, and no caption. An image beside the folders has no class and is rejected. A
      folder without images ends the run, because it would shift the labels after it.
    - otherwise: every image below the folder, in the order of paths, with its caption beside it: NAME.json with the
      fields of a listing, or NAME.txt.

    Images are files named *.png, *.jpg, *.jpeg or *.webp. Without a listing, other files except captions of images come
    after the images and are rejected; data/sources/folder_walk.py defines which files count at all.
    """

    def __init__(
        self,
        images: Path,
        listing: Path | None = None,
        *,
        labels: bool = False,
        without: Path | None = None,
        links_outside: bool = True,
    ) -> None:
        """`without`: a folder below `images` that is ignored, such as the output.

        Raises UserError: no such folder or file, no images, no classes, listing and labels at once; or without
        `links_outside`, a link leads to a file outside the folder.
        """
        if labels and listing is not None:
            raise UserError("give --captions or --labels, not both: labels are the names of the folders")
        self._images = images
        self._root = images.resolve()
        if not images.is_dir():
            raise UserError(f"{images}: no such folder; give --images the folder that holds the images")
        self._lines: list[bytes] | None = None
        self._paths: Sequence[str] = ()
        self._others: Sequence[tuple[str, str]] = ()
        self._classes: list[str] | None = None
        self.outside: tuple[str, ...] = ()
        if listing is None:
            found = images_below(images, without=without)
            self.outside = found.outside
            if self.outside and not links_outside:
                raise UserError(f"{self.outside_line}; take the links out, or leave --no-links-outside out")
            self._paths, self._others = found.names, found.others
            digest = files.digest([*self._paths, *(["other files", *self._others] if self._others else [])])
        else:
            if not listing.is_file():
                raise UserError(f"{listing}: no such file; give --captions a jsonl file")
            try:
                with limits.open_file(listing, limits.LISTING_BYTES) as file:
                    lines = without_mark(limits.lines(file, listing))
                    self._lines = [line for some in lines for line in some.splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"{listing}: cannot be read as text ({reason}); give lines of UTF-8"
                ) from None
            self._where = listing.name
            digest = files.sha256(listing)
        if not (self._paths if self._lines is None else self._lines):
            raise UserError(f"{listing or images}: lists no image; supported: {', '.join(IMAGE_PARTS)}")
        if labels:
            self._classes = found.classes()
            if not self._classes:
                raise UserError(f"{images}: no folder with images in it; --labels needs one for each class")
        kind = "captions" if self._classes is None else f"{len(self._classes)} classes"
        self.description = f"folder {self._root.name} with {kind}, listing {digest[:12]}"

    @property
    def outside_line(self) -> str:
        """A line about files outside the folder that links lead to, which published shards would contain; "": none."""
        if not self.outside:
            return ""
        count = f"{len(self.outside)} {'file lies' if len(self.outside) == 1 else 'files lie'}"
        return f"{count} outside {self._images}, links lead there: {first_of(self.outside)}"

    def __len__(self) -> int:
        """Number of items: images, good or bad, and other files."""
        return len(self._paths) + len(self._others) if self._lines is None else len(self._lines)

    def sample(self, index: int) -> Sample:
        """Item `index`.

        Raises BadItemError: an unreadable image, a file outside the folder, no caption, no class, or a bad json, line
        or splits.
        """
        key = f"image-{index:09d}"
        if self._lines is not None:
            return self._from_line(key, index)
        if index >= len(self._paths):
            name, reason = self._others[index - len(self._paths)]
            raise BadItemError(f"file-{index:09d}", f"other file: {name}: {reason}")
        name = self._paths[index]
        if self._classes is None:
            fields = self._from_sidecar(key, name)
        elif "/" not in name:
            raise BadItemError(key, f"no class: {name} lies in no folder below {self._root.name}")
        else:
            label = bisect.bisect_left(self._classes, name.partition("/")[0])
            fields = {"label": label, "class": self._classes[label]}
        return _sample(key, {"": (name, self._read(key, name))}, {**fields, "file": name})

    def _from_line(self, key: str, index: int) -> Sample:
        assert self._lines is not None
        where = f"{self._where}: entry {index + 1}"
        fields = _fields(key, self._lines[index], where)
        try:
            names = _listed(fields)
        except ValueError as error:
            raise BadItemError(key, f"bad line: {where}: {error}") from None
        payloads = {role: (name, self._read_listed(key, name)) for role, name in names.items()}
        if is_interleaved(names):
            return _sample(key, payloads, _with_splits(key, fields, where, names))
        return _sample(key, payloads, _with_texts(key, fields, where, is_edit=list(names) != [""]))

    def _from_sidecar(self, key: str, name: str) -> dict[str, Any]:
        path = self._images / name
        fields: dict[str, Any] = {}
        try:
            if (side := path.with_suffix(".json")).is_file():
                fields = _fields(key, limits.read_bytes(side, limits.CAPTION_BYTES), f"{name}, {side.name}")
            if not any(select_texts(fields.get(field)) for field in TEXT_FIELDS):
                fields["caption"] = decode_text(
                    limits.read_bytes(path.with_suffix(".txt"), limits.CAPTION_BYTES)
                )
        except BadItemError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadItemError(
                key, f"no caption: {name}: none in a .txt or .json beside it ({reason})"
            ) from None
        return _with_texts(key, fields, name, is_edit=False)

    def _read_listed(self, key: str, name: str) -> bytes:
        """Reads a file that a listing names. The name may be a stranger's, so it must not lead out of the folder."""
        try:
            if PurePosixPath(name).is_absolute():  # json would tell where the folder was
                raise UserError(name)
            files.inside(self._root, name)
        except UserError:
            raise BadItemError(
                key, f"outside the folder: '{name}'; list paths below {self._root.name}"
            ) from None
        return self._read(key, name)

    def _read(self, key: str, name: str) -> bytes:
        try:
            return limits.read_bytes(self._images / name, limits.IMAGE_BYTES)
        except OSError as error:
            raise BadItemError(key, f"unreadable image: {name}: {error.strerror}") from None


def _fields(key: str, payload: bytes, where: str) -> dict[str, Any]:
    try:
        return read_object(payload)
    except ValueError as error:
        raise BadItemError(key, f"bad json: {where}: {error}") from None


def _with_texts(key: str, fields: Mapping[str, Any], where: str, is_edit: bool) -> dict[str, Any]:
    """`fields` with cleaned captions, or a list of cleaned instructions. Raises BadItemError: there is no text."""
    others = {name: value for name, value in fields.items() if name not in TEXT_FIELDS and value is not None}
    for name in ("instruction", "instructions") if is_edit else TEXT_FIELDS:
        texts = select_texts(fields.get(name))
        if texts and name.startswith("instruction"):
            return {**others, "instructions": [texts] if isinstance(texts, str) else texts}
        if texts:
            return {**others, name: texts}
    raise BadItemError(key, f"{'no instruction' if is_edit else 'no caption'}: {where}: missing or empty")


def _listed(fields: Mapping[str, Any]) -> dict[str, str]:
    """Role -> file in a line of a listing. Raises ValueError: a file is not a path, or the files make no sample."""
    names: dict[str, Any] = {"": fields.get("file")}
    if "file" not in fields and "target" in fields:
        names = {**_numbered("source", fields.get("source")), **_numbered("target", fields["target"])}
    elif "file" not in fields and isinstance(fields.get("splits"), list):
        found = [split.get("image") for split in fields["splits"] if isinstance(split, Mapping)]
        different = list(dict.fromkeys(name for name in found if isinstance(name, str)))
        names = dict(zip(number_roles("image", len(different)), different, strict=True))
    for role, name in names.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f'expected "{role or "file"}" to be a path below the folder')
    check_roles(list(names))
    return names


def _numbered(kind: str, files: object) -> dict[str, Any]:
    """Role -> file for one file or a list of files."""
    if not isinstance(files, list) or len(files) == 1:
        return {kind: files[0] if isinstance(files, list) else files}
    return dict(zip(number_roles(kind, len(files)), files, strict=True))


def _with_splits(key: str, fields: Mapping[str, Any], where: str, names: Mapping[str, str]) -> dict[str, Any]:
    """`fields` with the files in "splits" replaced by roles. Raises BadItemError: bad splits."""
    roles = {name: role for role, name in names.items()}
    splits = [
        {**split, "image": roles[split["image"]]}
        if isinstance(split, Mapping) and isinstance(split.get("image"), str)
        else split
        for split in fields["splits"]
    ]
    tree = {name: value for name, value in fields.items() if name not in TEXT_FIELDS and value is not None}
    tree |= {"splits": clean_splits(splits), "files": list(names.values())}
    try:
        read_splits(tree, list(names))
    except ValueError as error:
        raise BadItemError(key, f"bad splits: {where}: {error}") from None
    return tree


def _sample(key: str, files: Mapping[str, tuple[str, bytes]], fields: Mapping[str, Any]) -> Sample:
    """A sample from `files`: role -> (name, bytes). Contents, not file names, decide the suffixes of the parts."""
    parts = {"json": json.dumps(fields, sort_keys=True).encode()}
    for role, (name, payload) in files.items():
        try:
            suffix = image_suffix(payload)
        except ValueError as error:
            raise BadItemError(key, f"unreadable image: {name}: {error}") from None
        parts[part_name(role, suffix)] = payload
    return Sample(key, parts)
