"""A lookup table for captions distributed apart from their images, such as LLaVA-NeXT's for CC12M.

The table is a SQLite file, built once from parquet or jsonl files and read by many processes. It holds 64-bit hashes of
keys and urls; the probability that two of 11 M rows share a hash is 3e-6.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sqlite3
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files, limits
from base.config import UserError
from base.progress import ProgressLine
from data.samples.captions import clean_text
from data.shards.index import key_hash
from data.sources.base import BadItemError
from data.sources.caption_files import batches
from data.sources.config import Join

LAYOUT = 1  # raise it when equal files would give another table
# Columns of CaptionEmporium/conceptual-captions-cc12m-llavanext -> names in json's "captions".
LLAVA_NEXT = {"caption_llava": "llava", "caption_llava_short": "llava_short", "caption": "alt"}


class CaptionTable:
    """Captions by the image's key or url, from `build_caption_table`'s file. Forked processes may use it."""

    def __init__(self, path: Path, *, join: Join = "url") -> None:
        """`join`: the column that finds a sample's row. Keys number the images of one download; other downloads differ.

        Raises UserError: there is no finished table.
        """
        self._path = path
        self._join = join
        self._connection: tuple[int, sqlite3.Connection] | None = None
        identity = _identity(path)
        if identity is None:
            raise UserError(f"{path}: no finished caption table; build it first")
        self._names = list(identity["columns"].values())
        columns = ", ".join(f"{column} as {name}" for column, name in identity["columns"].items())
        digest = files.digest([file["sha256"] for file in identity["files"]])[:12]
        self.description = f"captions {columns} by {join}, of files with digest {digest}"

    def find(self, item: str, key: str, url: str) -> dict[str, str]:
        """{name: caption} of the image with this `key` or `url`, without empty captions; `item`: for messages.

        The first of several rows counts. Raises BadItemError: no row, all captions empty, or the row with this key has
        another url.
        """
        key, url = _cleaned(key), _cleaned(url)
        wanted = _key_hash(key) if self._join == "key" else _url_hash(url)
        row = (
            self._connected()
            .execute(f"SELECT * FROM captions WHERE {self._join} = ? ORDER BY rowid LIMIT 1", (wanted,))  # noqa: S608  # a column of ours
            .fetchone()
        )
        if row is None:
            raise BadItemError(
                item, f"no caption: no row with {self._join} '{key if self._join == 'key' else url}'"
            )
        if self._join == "key" and url and row[1] is not None and row[1] != _url_hash(url):
            raise BadItemError(item, f"other image: the row with key '{key}' has another url; join by url")
        found = {name: text for name, text in zip(self._names, row[2:], strict=True) if text}
        if not found:
            raise BadItemError(item, f"no caption: those of key '{key}' are empty")
        return found

    def _connected(self) -> sqlite3.Connection:
        """This process's own connection: a connection must not be carried over a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = os.getpid(), _open(self._path)
        return self._connection[1]


def build_caption_table(
    captions: Sequence[Path],
    path: Path,
    *,
    columns: Mapping[str, str] = LLAVA_NEXT,
    key_column: str = "key",
    url_column: str = "url",
) -> None:
    """Writes the table `path` from .parquet, .jsonl or .jsonl.gz files, unless it was already made of equal ones.

    `columns`: the files' columns with captions -> their names in json's "captions". Files are equal if their names and
    contents are; a content is hashed again only if size or time have changed. A killed build leaves no table. One of
    several commands builds while the others wait. Raises UserError: a missing or damaged file, a column without any
    value, or no folder to write to.
    """
    if not captions or not columns or len(set(columns.values())) != len(columns):
        raise UserError("a caption table needs a file, and columns of captions, each with a name of its own")
    wanted = {"layout": LAYOUT, "columns": dict(columns), "key": key_column, "url": url_column}
    old = _identity(path) or {}
    new = {**wanted, "files": [_describe(file, old.get("files", [])) for file in captions]}
    if _is_made_of(new, path):
        return
    with _only_builder(path):
        if not _is_made_of(new, path):
            _build(path, new, captions)


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Waits while another command builds the table `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{path.parent}: no folder to write to ({error.strerror}); choose another") from None
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(path: Path, identity: Mapping[str, Any], captions: Sequence[Path]) -> None:
    for stale in path.parent.glob(f".{path.name}.{socket.gethostname()}-*.tmp"):  # left by a killed build
        stale.unlink()
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        connection = sqlite3.connect(temporary)
        with contextlib.closing(connection), connection:
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
            _fill(connection, captions, list(identity["columns"]), identity["key"], identity["url"])
            connection.execute("CREATE TABLE identity (json TEXT)")
            connection.execute("INSERT INTO identity VALUES (?)", (json.dumps(identity),))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        files.fsync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _fill(
    connection: sqlite3.Connection,
    captions: Sequence[Path],
    columns: Sequence[str],
    key_column: str,
    url_column: str,
) -> None:
    texts = ", ".join(f"text{number} TEXT" for number in range(len(columns)))
    connection.execute(f"CREATE TABLE captions (key INTEGER, url INTEGER, {texts})")
    insert = f"INSERT INTO captions VALUES ({', '.join('?' * (len(columns) + 2))})"  # noqa: S608  # question marks alone
    names = [key_column, url_column, *columns]
    filled = dict.fromkeys(names, 0)
    progress, count = ProgressLine("caption table", "rows"), 0
    for number, file in enumerate(captions):
        for rows, share in batches(file, names):
            records = []
            for row in rows:
                key, url, *found = (_text(file, name, row.get(name)) for name in names)
                records.append((_key_hash(key) if key else None, _url_hash(url) if url else None, *found))
                for name, text in zip(names, (key, url, *found), strict=True):
                    filled[name] += bool(text)
            connection.executemany(insert, records)
            count += len(records)
            progress.show(count, (number + share) / len(captions) * 0.9)  # the rest is sorting
    missing = [name for name in columns if not filled[name]]
    if missing or not filled[key_column] + filled[url_column]:
        missing = missing or [key_column, url_column]
        raise UserError(
            f"{', '.join(map(str, captions))}: nothing in column {', '.join(missing)}; name columns that are filled"
        )
    for name in ("key", "url"):
        connection.execute(f"CREATE INDEX by_{name} ON captions ({name})")
    progress.show(count, 1)


def _text(file: Path, column: str, value: object) -> str:
    if isinstance(value, int):  # a key may be a number
        return str(value)
    if not isinstance(value, str | None):
        raise UserError(f"{file}: column '{column}' holds {type(value).__name__}, not text; name another one")
    return _cleaned(value or "")


def _cleaned(text: str) -> str:
    """`text` cleaned as captions are everywhere: SQLite and hashes refuse a lone surrogate, which JSON can hold."""
    text = clean_text(text) if len(text) <= limits.CAPTION_BYTES else ""
    return "" if "\0" in text else text


def _key_hash(key: str) -> int:
    """Signed 64-bit hash of a key. 000000012 and 12 are one key, because tables and tars pad numbers differently."""
    return key_hash(key.lstrip("0") if key.isdecimal() else key) - (1 << 63)


def _url_hash(url: str) -> int:
    return key_hash(url) - (1 << 63)


def _describe(file: Path, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name, size, time and SHA-256 of a file; takes the SHA-256 from `known` if name, size and time are equal there."""
    try:
        status = file.stat()
    except OSError:
        raise UserError(f"{file}: no such file; download it, or correct the path") from None
    described = {"name": file.name, "num_bytes": status.st_size, "time_ns": status.st_mtime_ns}
    for other in known:
        if {**other, "sha256": ""} == {**described, "sha256": ""}:
            return dict(other)
    return {**described, "sha256": files.sha256(file)}


def _is_made_of(wanted: Mapping[str, Any], path: Path) -> bool:
    """Whether `path` is a table of the files and columns in `wanted`, in that order."""
    found = _identity(path)
    if found is None or _without_times(found) != _without_times(wanted):
        return False
    return list(found["columns"]) == list(wanted["columns"])


def _without_times(identity: Mapping[str, Any]) -> dict[str, Any]:
    rest = [{name: file[name] for name in ("name", "sha256")} for file in identity.get("files", [])]
    return {**identity, "files": rest}


def _identity(path: Path) -> dict[str, Any] | None:
    """The files and columns that the table `path` was made of; None: there is no table."""
    if not path.is_file():
        return None
    connection = _open(path)
    try:
        identity: dict[str, Any] = json.loads(connection.execute("SELECT json FROM identity").fetchone()[0])
    except (sqlite3.DatabaseError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: not a caption table; delete it, or give another path") from None
    finally:
        connection.close()
    return identity


def _open(path: Path) -> sqlite3.Connection:
    """Opens a table read-only and without locks: its file never changes, and is only replaced."""
    location = urllib.parse.quote(str(path.resolve()))
    return sqlite3.connect(f"file:{location}?mode=ro&immutable=1", uri=True)
