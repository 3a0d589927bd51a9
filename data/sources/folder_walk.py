"""Walks folders that people bring, with one set of rules for every command that reads files below a folder.

Names that start with a dot and `__MACOSX` are ignored: programs leave them, and nobody means them (.DS_Store, ._0.png,
.ipynb_checkpoints). Links to files and folders are followed. Names are sorted as texts, with "/" between folders.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from base.config import UserError
from base.terminal import say
from data.samples.images import IMAGE_PARTS

MAC_FOLDER = "__MACOSX"
SIDECARS = ("txt", "json")  # files beside an image that hold its caption
MAX_NAMED = 3  # files that a note names
MAX_WAYS = 16  # ways to one folder: links that double at each level grow exponentially


@dataclass(frozen=True)
class Below:
    """The content of a folder and its subfolders; names are sorted and relative to the folder, with "/"."""

    files: tuple[str, ...]
    """Regular files, and dangling links, which the reader reports."""
    others: tuple[tuple[str, str], ...]
    """(name, reason) of pipes, sockets and devices, which cannot be read as files."""
    folders: tuple[str, ...]
    """The folders directly in the folder."""
    outside: tuple[str, ...] = ()
    """The `files` that lie outside the folder, to which links lead."""


@dataclass(frozen=True)
class ImagesBelow:
    """The image files below a folder."""

    folder: Path
    names: tuple[str, ...]
    """Names relative to `folder`, sorted."""
    others: tuple[tuple[str, str], ...]
    """(name, reason) of all files that are neither images nor the caption of one."""
    folders: tuple[str, ...]
    """The folders directly in `folder`, with or without images."""
    outside: tuple[str, ...] = ()
    """Images, and captions of images, that lie outside `folder`, to which links lead."""

    @property
    def paths(self) -> list[Path]:
        """The paths of the images."""
        return [self.folder / name for name in self.names]

    def classes(self) -> list[str]:
        """The folders directly in `folder`, sorted, each of which is a class.

        Raises UserError: a folder has no image; leaving the class out would shift the labels after it.
        """
        filled = {name.partition("/")[0] for name in self.names if "/" in name}
        for name in self.folders:
            if name not in filled:
                raise UserError(
                    f"{self.folder / name}: a class folder without an image ({', '.join(IMAGE_PARTS)}); fill it or "
                    "take it out: the labels of all classes after it depend on it"
                )
        return list(self.folders)

    def tell_others(self) -> None:
        """Prints one line on stderr about files that are not read, if there are any."""
        tell_passed_over(self.folder, [name for name, _ in self.others])


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored."""
    return name.startswith(".") or name == MAC_FOLDER


def below(folder: Path, *, without: Path | None = None) -> Below:
    """Everything below `folder` except hidden names and the folder `without`.

    Raises UserError: a folder cannot be read, links form a cycle, or links lead to a folder in more than MAX_WAYS ways.
    """
    skipped = _identity(without) if without is not None and without.is_dir() else None
    root = folder.resolve()
    above = frozenset(_identity(path) for path in (root, *root.parents))
    files: list[str] = []
    others: list[tuple[str, str]] = []
    folders: list[str] = []
    outside: list[str] = []
    ways = Counter[tuple[int, int]]()
    todo = [("", above, False)]  # (folder, the folders that lead to it, whether it lies outside)
    while todo:
        prefix, way, is_outside = todo.pop()
        for entry in _entries(folder / prefix):
            name = prefix + entry.name
            if is_hidden(entry.name):
                continue
            try:
                identity = _identity(folder / name) if entry.is_dir() else None
                is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))  # noqa: PTH110
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise _refused(folder / name, error) from None
                raise UserError(f"{folder / name}: a circle of links; remove the link") from None
            if identity in way:
                raise UserError(
                    f"{folder / name}: a circle of links, it leads back to {(folder / name).resolve()}; remove the link"
                )
            leads_out = is_outside
            if entry.is_symlink():
                leads_out = not (folder / name).resolve().is_relative_to(root)
            if identity is None:
                (files.append(name) if is_file else others.append((name, "a pipe or device")))
                outside += [name] if leads_out and is_file else []
            elif identity != skipped:
                ways[identity] += 1
                if ways[identity] > MAX_WAYS:
                    raise UserError(
                        f"{folder / name}: links lead to {(folder / name).resolve()} in more than {MAX_WAYS} ways; "
                        "remove some"
                    )
                todo.append((f"{name}/", way | {identity}, leads_out))
                folders += [] if prefix else [name]
    return Below(tuple(sorted(files)), tuple(sorted(others)), tuple(sorted(folders)), tuple(sorted(outside)))


def images_below(
    folder: Path, suffixes: Sequence[str] = IMAGE_PARTS, *, without: Path | None = None
) -> ImagesBelow:
    """The image files below `folder`, by suffix. Raises UserError: no such folder; as `below`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the images")
    found = below(folder, without=without)
    names = tuple(name for name in found.files if suffix_of(name) in suffixes)
    stems = {_stem(name) for name in names}
    others = list(found.others)
    used = set()
    for name in found.files:
        if suffix_of(name) in suffixes or (suffix_of(name) in SIDECARS and _stem(name) in stems):
            used.add(name)
            continue
        if suffix_of(name) in SIDECARS:
            others.append((name, "no image of this name lies beside it"))
        else:
            kinds = ", ".join(f".{suffix}" for suffix in suffixes)
            others.append((name, f"images are {kinds}; convert it, or take it out"))
    outside = tuple(name for name in found.outside if name in used)
    return ImagesBelow(folder, names, tuple(sorted(others)), found.folders, outside)


def suffix_of(name: str) -> str:
    """The suffix of a name in lower case: "jpg" for "a/b.JPG"."""
    return PurePosixPath(name).suffix.lower().lstrip(".")


def first_of(names: Sequence[str]) -> str:
    """The first MAX_NAMED names, for a message."""
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")


def tell_passed_over(folder: object, names: Sequence[str]) -> None:
    """Prints one line on stderr, on rank 0, about files below `folder` that are not read, if there are any."""
    if names and os.environ.get("RANK", "0") == "0":
        count = f"{len(names)} other {'file is' if len(names) == 1 else 'files are'}"
        say(f"{folder}: {count} not read: {first_of(names)}", sys.stderr)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _refused(folder, error) from None


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode, which are equal for all paths to one folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror}); check the folder's permissions")


def _stem(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]
