"""Reads tars strictly: refuses a damaged tar, which the standard library and WebDataset would take for a shorter one.

Reads uncompressed USTAR, GNU and PAX. Every header's checksum must be right, every payload whole, and the
end-of-archive marker present. All reads use `pread`, so that forked processes may share a reader.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from base import limits
from base.config import UserError
from data.shards.index import TAR_BLOCK_BYTES

AGAIN = "download or copy it again"
NO_HEADER = "no tar header (a compressed tar must be unpacked first)"
MAX_EXTENDED_BYTES = 1 << 20  # of a PAX or GNU header; real headers have some hundred
MAX_PADDING_BYTES = 1 << 20  # of zeros after the end marker; GNU tar and Python pad to 10 KiB
ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)
FILE_KINDS = (b"0", b"\0", b"7")
KINDS_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar; offsets are bytes from the start of the file."""

    name: str
    kind: Literal["file", "folder", "other"]  # other: a link, a device, ...
    offset: int  # of the first header
    header_blocks: int  # blocks before the payload, extended headers included
    num_bytes: int  # of the payload
    is_renamed: bool  # whether an extended header holds its name

    @property
    def data_offset(self) -> int:
        """Offset of the payload."""
        return self.offset + self.header_blocks * TAR_BLOCK_BYTES

    @property
    def end(self) -> int:
        """Offset of the next member."""
        return self.data_offset + _padded(self.num_bytes)


class TarReader:
    """An open tar, as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises UserError: no such file."""
        self.path = path
        try:
            self._descriptor = limits.open_regular(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path") from None
        self.num_bytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` at `offset`. Raises UserError: the file is shorter or cannot be read."""
        pieces: list[bytes] = []
        while num_bytes > 0:
            try:
                piece = os.pread(self._descriptor, num_bytes, offset)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror}); check the disk") from None
            if not piece:
                raise UserError(f"{self.path}: cut short, ends at byte {offset}; {AGAIN}")
            pieces.append(piece)
            offset, num_bytes = offset + len(piece), num_bytes - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def payload(self, member: Member, limit_bytes: int = limits.IMAGE_BYTES) -> bytes:
        """The bytes of a member. Raises OSError: more than the limit, which a sparse archive can hold in no space."""
        if member.num_bytes > limit_bytes:
            raise limits.too_large(self.path, f"'{member.name}' has {member.num_bytes:,} bytes", limit_bytes)
        return self.read(member.data_offset, member.num_bytes)

    def members(self, inside: Member | None = None) -> Iterator[Member]:
        """Yields every entry in file order; `inside`: reads the tar that is this member's payload.

        Raises UserError naming the byte: a bad checksum, a zeroed header, a truncated payload, no end marker, or data
        after the end marker.
        """
        position, end = 0, self.num_bytes
        if inside is not None:
            position, end = inside.data_offset, inside.data_offset + inside.num_bytes
        for_all: dict[str, str] = {}  # from PAX headers for all following members
        own: dict[str, str] = {}  # from PAX and GNU headers for the next member
        first = position
        while (header := self._header(position, end)) is not None:
            kind, size, name = header
            data = position + TAR_BLOCK_BYTES
            if kind in (b"x", b"g", b"L", b"K"):
                if size > MAX_EXTENDED_BYTES or data + size > end:
                    raise self._damaged(position, f"an extended header of {size} bytes")
                extended = self.read(data, size)
                if kind == b"L":
                    own["path"] = _text(extended)
                elif kind != b"K":  # K: the long target of a link; links are not followed
                    (own if kind == b"x" else for_all).update(self._pax(extended, position))
                position = data + _padded(size)
                continue
            fields = {**for_all, **own}
            if kind == b"S" or any(field.startswith("GNU.sparse") for field in fields):
                raise UserError(
                    f"{self.path}: sparse file at byte {position}; pack it again without --sparse"
                )
            if "size" in fields:
                size = self._decimal(fields["size"], position)
            num_bytes = 0 if kind in KINDS_WITHOUT_PAYLOAD else size
            if data + _padded(num_bytes) > end:
                raise UserError(
                    f"{self.path}: cut short, '{name}' at byte {position} needs {_padded(num_bytes)} bytes "
                    f"but {max(0, end - data)} follow; {AGAIN}"
                )
            member = Member(
                name=fields.get("path", name),
                kind="file" if kind in FILE_KINDS else "folder" if kind == b"5" else "other",
                offset=first,
                header_blocks=(data - first) // TAR_BLOCK_BYTES,
                num_bytes=num_bytes,
                is_renamed=fields.get("path", name) != name,
            )
            yield member
            first = position = member.end
            own = {}
        if first != position:
            raise self._damaged(position, "an extended header without a member")

    def _header(self, position: int, end: int) -> tuple[bytes, int, str] | None:
        """(kind, payload bytes, name) at `position`, or None at the end of the archive."""
        if end - position < TAR_BLOCK_BYTES:
            raise UserError(f"{self.path}: cut short, no end-of-archive marker at byte {position}; {AGAIN}")
        block = self.read(position, TAR_BLOCK_BYTES)
        if block == ZERO_BLOCK:
            self._check_end(position, end)
            return None
        checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")  # its own field counts as spaces
        if self._number(block[148:156], position) != checksum:
            raise self._damaged(position, NO_HEADER)
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345] != 0:  # GNU uses this field otherwise
            name = f"{_text(block[345:500])}/{name}"
        return block[156:157], self._number(block[124:136], position), name

    def _check_end(self, position: int, end: int) -> None:
        """Checks that two or more blocks of zeros, and nothing else, follow from `position`. Raises UserError."""
        rest = end - position
        if rest < 2 * TAR_BLOCK_BYTES:
            raise UserError(f"{self.path}: cut short, half an end marker at byte {position}; {AGAIN}")
        if self.read(position, min(rest, MAX_PADDING_BYTES)).strip(b"\0"):
            raise self._damaged(position, "a zeroed header, with data after it")
        if rest > MAX_PADDING_BYTES:
            raise self._damaged(position, f"{rest} bytes from here on were never written")

    def _pax(self, records: bytes, position: int) -> dict[str, str]:
        """Parses records of the form `LENGTH KEYWORD=VALUE\\n`, whose LENGTH counts the whole record."""
        fields: dict[str, str] = {}
        while records:
            length = self._decimal(_text(records.partition(b" ")[0]), position)
            record, records = records[:length], records[length:]
            keyword, equals, value = record.partition(b" ")[2].partition(b"=")
            if not equals or not value.endswith(b"\n") or len(record) != length:
                raise self._damaged(position, "a PAX header that cannot be parsed")
            fields[_text(keyword)] = _text(value[:-1])
        return fields

    def _number(self, text: bytes, position: int) -> int:
        """Parses an octal number, or GNU's base 256 for numbers that do not fit."""
        if text[0] == 0x80:
            return int.from_bytes(text[1:], "big")
        digits = text.replace(b"\0", b" ").strip()
        if not re.fullmatch(rb"[0-7]*", digits):  # int() accepts a sign; a negative size would lead back
            raise self._damaged(position, NO_HEADER)
        return int(digits or b"0", 8)

    def _decimal(self, text: str, position: int) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise self._damaged(position, f"a PAX header with {text[:20]!r} for a number")
        return int(text)

    def _damaged(self, position: int, what: str) -> UserError:
        return UserError(f"{self.path}: damaged at byte {position}: {what}; {AGAIN}")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
