"""Limits of what is read: regular files only, and a largest size for each kind of file, line and unpacked piece.

Strangers' files are read through this module, so that no read waits for a pipe, no endless device fills the memory, and
a refusal names file and limit. The constants below are the limits, each with its reason.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from gzip import GzipFile
from pathlib import Path
from typing import IO, Any, BinaryIO
from zipfile import ZipFile

from base.errors import UserError

MIB, GIB = 1 << 20, 1 << 30

CONFIG_BYTES = 16 * MIB
"""A YAML or JSON config. The largest published configs, which contain vocabularies, have some MiB."""
DOCUMENT_BYTES = 512 * MIB
"""A JSON document of a whole set: a manifest of a million shards has 300 MiB, scores and logs have less."""
CAPTION_BYTES = MIB
"""The text or JSON beside one image, in a folder, a tar or a table: a book of 200 pages fits."""
TEXT_BYTES = 512 * MIB
"""A list of prompts, labels, graphs or lines that is held as one text: room for ten million prompts."""
LISTING_BYTES = 8 * GIB
"""A list of files with captions, whose lines are held in memory: room for fifty million images."""
LINE_BYTES = 16 * MIB
"""One line of a list, unpacked. Usual rows have some KiB."""
IMAGE_BYTES = 544 * MIB
"""An image file: MAX_PIXELS (data/samples/images.py) uncompressed, in four channels of 16 bits, and its metadata."""
VOCABULARY_BYTES = 64 * MIB
"""A sentencepiece model. One of 256,000 pieces has 5 MiB."""
UNFOLD_FREE_BYTES, UNFOLD_RATIO = 256 * MIB, 200
"""Packed data may unpack to the larger of these bytes and this multiple of its size. Text packs to a tenth."""
BATCH_BYTES = GIB
"""Rows of a table that are unpacked at once."""
ARRAY_BYTES = GIB
"""An array of statistics in an .npz file. A covariance of 8192 features has half of this."""
CHUNK_BYTES = MIB
"""Size of one read from a file of any size."""


def open_regular(path: str | Path, limit_bytes: int | None = None) -> int:
    """A descriptor of the regular file at `path`. The caller reads and closes it.

    Raises OSError: as open(); the path or the target of its link is not a regular file (reading a pipe could wait for
    ever, a device may have no end); the file has more than `limit_bytes`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (limit_bytes is None or status.st_size <= limit_bytes):
        return descriptor
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        assert limit_bytes is not None
        raise too_large(path, f"{status.st_size:,} bytes", limit_bytes)
    is_folder = stat.S_ISDIR(status.st_mode)
    number = errno.EISDIR if is_folder else errno.EINVAL
    raise OSError(number, os.strerror(number) if is_folder else "a pipe or device, not a file", str(path))


def check_regular(path: str | Path, limit_bytes: int | None = None) -> None:
    """Checks `path` for a library that opens it itself. Raises OSError: as open_regular."""
    os.close(open_regular(path, limit_bytes))


def open_file(path: str | Path, limit_bytes: int | None = None) -> BinaryIO:
    """The regular file at `path`, opened for reading bytes. Raises OSError: as open_regular."""
    return os.fdopen(open_regular(path, limit_bytes), "rb")


def read_bytes(path: str | Path, limit_bytes: int) -> bytes:
    """The bytes of the file at `path`. Raises OSError: as open_regular; it holds more than its size, as in /proc."""
    with open_file(path, limit_bytes) as file:
        return read_all(file, limit_bytes, path, os.fstat(file.fileno()).st_size)


def read_all(file: IO[bytes], limit_bytes: int, where: object, expected_bytes: int = CHUNK_BYTES) -> bytes:
    """The rest of a stream, which may be endless. Raises OSError: more than `limit_bytes`."""
    content = file.read(expected_bytes)
    while more := file.read(CHUNK_BYTES):
        content += more
        if len(content) > limit_bytes:
            raise too_large(where, "more", limit_bytes)
    return content


def lines(file: IO[bytes] | GzipFile, where: object, *, packed_bytes: int | None = None) -> Iterator[bytes]:
    """The lines of a stream, with their line ends. `packed_bytes`: the stream's packed size; None: it is not packed.

    Raises OSError: a line has more than LINE_BYTES, or the stream unpacks to more than `unfolded(packed_bytes)`.
    """
    number, num_bytes = 0, 0
    most = None if packed_bytes is None else unfolded(packed_bytes)
    while line := file.readline(LINE_BYTES + 1):
        number, num_bytes = number + 1, num_bytes + len(line)
        if len(line) > LINE_BYTES:
            raise too_large(where, f"line {number} has more", LINE_BYTES)
        if most is not None and num_bytes > most:
            raise too_large(where, f"it unfolds to more by line {number}", most)
        yield line


def check_members(archive: ZipFile, names: Sequence[str]) -> None:
    """Raises OSError: one of the members `names` unpacks to more than ARRAY_BYTES."""
    for entry in archive.infolist():
        if entry.filename in names and entry.file_size > ARRAY_BYTES:
            raise too_large(
                archive.filename, f"'{entry.filename}' unfolds to {entry.file_size:,} bytes", ARRAY_BYTES
            )


def unfolded(packed_bytes: int) -> int:
    """The most bytes to which `packed_bytes` bytes may unpack."""
    return max(UNFOLD_FREE_BYTES, UNFOLD_RATIO * packed_bytes)


def read_text(path: str | Path, limit_bytes: int = DOCUMENT_BYTES) -> str:
    """The text of a UTF-8 file. Raises OSError: as read_bytes; ValueError: not UTF-8."""
    return read_bytes(path, limit_bytes).decode("utf-8")


def read_json(path: str | Path, what: str = "a file of ours", limit_bytes: int = DOCUMENT_BYTES) -> Any:
    """Parses a UTF-8 JSON file; `what`: what the file should be, for the message.

    Raises FileNotFoundError and other OSErrors of open(); UserError: not a regular file, more than `limit_bytes`, not
    UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(read_text(path, limit_bytes))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG):
            raise
        raise UserError(f"{path}: cannot be read as {what} ({error.strerror}); write it again") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deep for {what}; write it again") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again") from None


def too_large(where: object, found: str, limit_bytes: int) -> OSError:
    """The error for data over a limit; `found`: its size, in words."""
    return OSError(errno.EFBIG, f"{found}, over the limit of {_size(limit_bytes)}", str(where))


def _size(num_bytes: int) -> str:
    unit, name = next(pair for pair in ((GIB, "GiB"), (MIB, "MiB"), (1, "bytes")) if num_bytes >= pair[0])
    return f"{num_bytes / unit:g} {name}"
