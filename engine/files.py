"""Files that are whole or absent: write under a temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config import UserError

HASH_CHUNK_BYTES = 1 << 20


def write_bytes(path: str | Path, payload: bytes) -> None:
    """Writes `payload` so that a killed process leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` for JSON, keys sorted, so that equal values give equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def open_regular(path: str | Path) -> int:
    """A descriptor of the file at `path`, to be read and closed by the caller.

    Raises OSError: as open(), and for what is no regular file: a pipe that nobody writes to would be waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    number = errno.EISDIR if is_folder else errno.EINVAL
    raise OSError(number, os.strerror(number) if is_folder else "a pipe or device, not a file", str(path))


def read_regular(path: str | Path) -> bytes:
    """The bytes of the file at `path`. Raises OSError: as open_regular."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def read_json(path: str | Path) -> Any:
    """Parses a UTF-8 JSON file. Raises OSError; UserError: not JSON, not UTF-8, nested too deep."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: nested too deep for a file of ours; write it again") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that holds an object. Raises OSError, UserError."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: no JSON object; write it again")
    return tree


@contextmanager
def directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path`; on success it is renamed to `path`, replacing what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    yield temporary
    fsync_tree(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
    fsync_directory(path.parent)


def fsync_tree(root: str | Path) -> None:
    """Flushes every file below `root`, then the directories, to the disk."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)  # noqa: PTH118
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(folder)


def fsync_directory(path: str | Path) -> None:
    """Makes a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order: the fingerprint of configs and manifests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
