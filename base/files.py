"""Files that are whole or absent (temporary name, fsync, rename), and rules of which folders a command may write to.

A command replaces and removes only its own files. It marks an output folder (`claim`) before it writes there. In a
folder without the marker, files with the names that the command writes count as somebody else's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from base import limits
from base.config import UserError
from base.limits import read_json as read_json

HASH_CHUNK_BYTES = 1 << 20
PAGE_SIGN = "<!-- written by RPiAE -->"
SIGN_WITHIN_BYTES = 1 << 12
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exhausted quota and the shell's file-size limit."""
MADE_BY = ".made-by-"
"""Name of the marker file, before the command's name, in a folder that the command may write to."""
REPLACED = ".replaced"
"""Name of the old folder, in a temporary one, while its successor takes its place."""


def write_bytes(path: str | Path, payload: bytes) -> None:
    """Writes `payload` so that a killed process leaves the old file or the new one, never a part. Raises OSError."""
    path = Path(path)
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # the error of a failed write lacks the path; the partial file takes up space
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    fsync_directory(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` for JSON, keys sorted, so that equal values give equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def reason(error: OSError) -> str:
    """An OSError in words: `PATH: No space left on device`."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def full_disk(error: BaseException) -> UserError | None:
    """The one-line error for a write that found no room; None: `error` has another cause."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM:
        return None
    return UserError(f"{reason(error)}; make room and run the same command again")


def read_object(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object with `limits.read_json`. Raises OSError; UserError: as read_json, or not an object."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: no JSON object; write it again")
    return tree


def inside(folder: str | Path, name: str, *, follow_links: bool = False) -> Path:
    """The path of a file in or below `folder` that a list, a table or a manifest names.

    A stranger may have written the names, and the files that they lead to are published or shown. `follow_links`: the
    names come from a walk through the folder, whose links are the user's own. Raises UserError: `name` leads out of the
    folder (by "..", from the root or through a link), or is not a valid name.
    """
    path = Path(folder) / name
    try:
        if follow_links:
            is_inside = not os.path.isabs(name) and ".." not in path.parts[len(Path(folder).parts) :]  # noqa: PTH117
        else:
            is_inside = path.resolve().is_relative_to(Path(folder).resolve())
    except (OSError, ValueError, RuntimeError):  # a cycle of links; a zero byte
        is_inside = False
    if not is_inside:
        raise UserError(f"'{name}' leads out of {folder}; name a file in it")
    return path


@contextmanager
def directory(path: str | Path, is_own: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yields a temporary directory; on success it is renamed to `path`.

    A folder already at `path` is replaced if it is empty or `is_own` accepts it. POSIX cannot exchange two folders: a
    process that is killed between the two renames leaves nothing at `path`, and the next call puts the old folder back
    before it does anything else. Raises UserError: the folder is neither empty nor accepted.
    """
    path = Path(path)
    check_new(path, is_own)
    make_directory(path.parent)
    holder = path.with_name(f".{path.name}.tmp")
    check_new(holder, lambda left: (left / MADE_BY).is_file() or (is_own is not None and is_own(left)))
    _clear(holder, path)
    holder.mkdir()
    (holder / MADE_BY).touch()  # marks it, so that the next command may remove it after a kill
    fsync_directory(holder)
    new = holder / path.name
    try:
        new.mkdir()
        yield new
        fsync_tree(new)
        check_new(path, is_own)
        if path.is_dir() and any(path.iterdir()):  # a rename replaces an empty one
            path.rename(holder / REPLACED)
        new.replace(path)
        fsync_directory(path.parent)
    finally:
        with suppress(OSError):  # the next call removes what is left
            _clear(holder, path)


def _clear(holder: Path, path: Path) -> None:
    """Removes the folder in which `directory` works, its marker last. Puts a folder without a successor back."""
    if not holder.is_dir():
        return
    if (holder / REPLACED).is_dir() and not path.exists():
        (holder / REPLACED).rename(path)
        fsync_directory(path.parent)
    for part in (holder / path.name, holder / REPLACED):
        shutil.rmtree(part, ignore_errors=True)
    fsync_directory(holder)
    shutil.rmtree(holder, ignore_errors=True)


def check_new(path: str | Path, is_own: Callable[[Path], bool] | None = None) -> None:
    """Raises UserError: `path` is a file, or a folder that is not empty and that `is_own` does not accept."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: is not a folder; remove it or give another --out")
    if path.is_dir() and any(path.iterdir()) and not (is_own is not None and is_own(path)):
        raise UserError(f"{path}: is not an empty folder; remove it or give another --out")


def check_claim(
    folder: str | Path, command: str, names: Iterable[str], is_own: Callable[[Path], bool] | None = None
) -> None:
    """Checks that `command` may write files of `names` (patterns) into `folder`; writes nothing.

    The command may write if no such file exists, if its marker does, or if `is_own` recognises the files of an earlier
    version, which wrote no marker. Raises UserError: none of these holds.
    """
    folder = Path(folder)
    if (folder / f"{MADE_BY}{command}").is_file() or not (folder.exists() or folder.is_symlink()):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: no folder to write to (a file is there); choose another")
    exact, patterns = {*names}, [name for name in names if "*" in name]
    there = sorted(entry.name for entry in folder.iterdir())
    taken = [
        name for name in there if name in exact or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if taken and not (is_own is not None and is_own(folder)):
        raise UserError(
            f"{folder}: holds {taken[0]}, which {command} would write and did not; give another folder, or move it away"
        )


def claim(
    folder: str | Path, command: str, names: Iterable[str], is_own: Callable[[Path], bool] | None = None
) -> None:
    """Marks `folder` as one into which `command` may write `names`, now and when it is run again.

    Raises UserError: as check_claim; the folder cannot be made.
    """
    check_claim(folder, command, names, is_own)
    try:
        make_directory(folder)
        (Path(folder) / f"{MADE_BY}{command}").touch()  # several ranks may do this at one time
        fsync_directory(folder)  # before the files that it marks
    except OSError as error:
        raise UserError(f"{folder}: no folder to write to ({error.strerror}); choose another") from None


def check_inputs(folder: str | Path, names: Sequence[str], inputs: Iterable[str | Path]) -> None:
    """Raises UserError: a file of `inputs` lies in `folder` and matches one of the `names` that are written there."""
    there = Path(folder).resolve()
    for path in map(Path, inputs):
        where = path.resolve()
        if where.parent == there and any(fnmatchcase(where.name, pattern) for pattern in names):
            raise UserError(f"{path}: is input, and would be overwritten; give a folder other than {folder}")


def check_signed(path: str | Path, sign: str) -> None:
    """Raises UserError: `path` exists without `sign` in its first or last 4 KiB, so no command of ours wrote it."""
    path = Path(path)
    if path.is_file():
        with limits.open_file(path) as file:
            first = file.read(SIGN_WITHIN_BYTES)
            file.seek(max(path.stat().st_size - SIGN_WITHIN_BYTES, 0))
            if sign.encode() in first or sign.encode() in file.read():
                return
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path}: exists, and no command of this project wrote it; remove it or give another file"
        )


def write_page(path: str | Path, page: str) -> None:
    """Writes HTML with a sign, and replaces signed files only. Raises UserError: a file without the sign is there."""
    check_signed(path, PAGE_SIGN)
    write_bytes(path, f"{page}{PAGE_SIGN}\n".encode(errors="replace"))  # captions may hold lone surrogates


def make_directory(path: str | Path) -> None:
    """Makes the directory `path` and its missing parents, and flushes each new name to disk. Raises OSError."""
    path = Path(path)
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_tree(root: str | Path) -> None:
    """Flushes to disk every file below `root`, then the directories."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)  # noqa: PTH118
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(folder)


def fsync_directory(path: str | Path) -> None:
    """Flushes the directory `path` to disk, which makes a rename inside it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content. Raises OSError: as limits.open_file."""
    digest = hashlib.sha256()
    with limits.open_file(path) as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order: the fingerprint of configs and manifests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_file(path: str | Path) -> bool:
    """Whether `path` is a file. Unlike Path.is_file, takes invalid names: too long, or with a zero byte."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def checked(kind: TypeAdapter[Any], tree: Any, where: object) -> Any:
    """Returns `tree`, read from the file `where`, if it fits `kind`. Raises UserError naming the entry that differs."""
    try:
        kind.validate_python(tree, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200] or "the whole"
        raise UserError(
            f"{where}: {place}: {first['msg']}; write it again with the command that made it"
        ) from None
    return tree
