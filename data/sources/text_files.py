"""Reads text that people bring (captions, prompts, labels, JSON lines, CSV), all in UTF-8.

A byte order mark is not part of the text. Other encodings are refused: guessing one could silently change letters.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from base import limits
from base.config import UserError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(payload: bytes) -> str:
    """The text of a file's bytes, with its line ends. Raises ValueError: not UTF-8, or with zero bytes."""
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
    """The text of a file; `kind`: what the file is, for messages. Raises UserError: no such file, or not text."""
    try:
        return decode_text(limits.read_bytes(path, limits.TEXT_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read as {kind} ({reason}); give a text file in UTF-8") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text. Unlike str.splitlines(), does not split at U+2028 and similar, which JSON may contain."""
    return text.replace("\r\n", "\n").split("\n")


def without_mark(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file without its byte order mark, undecoded, so that one bad line spoils no other.

    Raises ValueError: UTF-16, whose bytes have no lines.
    """
    for number, line in enumerate(lines):
        if number == 0 and line.startswith(UTF16_MARKS):
            raise ValueError("UTF-16, not UTF-8")
        yield line if number else line.removeprefix(codecs.BOM_UTF8)
