"""Text that people bring: captions, prompts, labels, JSON lines, CSV. All of it is UTF-8.

A byte order mark belongs to the file, not to its text. Other bytes are refused: guessing an old code page would change
letters without a word.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from base import limits
from base.config import UserError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(payload: bytes) -> str:
    """The text of a file's bytes; line ends stay as they are. Raises ValueError: no UTF-8, zero bytes in it."""
    if payload.startswith(UTF16_MARKS):
        raise ValueError("UTF-16, not UTF-8")
    try:
        text = payload.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if "\0" in text:
        raise ValueError("zero bytes in it, so no UTF-8")
    return text


def read_text(path: str | Path, kind: str = "text") -> str:
    """The text of a file of this `kind`. Raises UserError: no such file, no text."""
    try:
        return decode_text(limits.read_bytes(path, limits.TEXT_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read as {kind} ({reason}); give a text file in UTF-8") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text. Not str.splitlines(): that also splits at U+2028 and its like, which may stand in JSON."""
    return text.replace("\r\n", "\n").split("\n")


def without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that may have one bad line among good ones, or not fit into memory: each is decoded alone.

    Raises ValueError: UTF-16, which has no lines of bytes.
    """
    for number, line in enumerate(lines):
        if number == 0 and line.startswith(UTF16_MARKS):
            raise ValueError("UTF-16, not UTF-8")
        yield line if number else line.removeprefix(codecs.BOM_UTF8)
