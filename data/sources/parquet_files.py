"""Finds parquet files, reads their footers, and reads their rows a few at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec
import pyarrow as pa

from base import limits
from base.config import UserError
from base.redaction import redact
from data.sources.folder_walk import below, is_hidden, tell_passed_over
from data.sources.parquet_reading import Row, open_table, row_batches

ROWS_AT_ONCE = 16  # rows in memory, with their images
READ_ERRORS = (OSError, ValueError, pa.ArrowException)


@dataclass(frozen=True)
class Footer:
    """The footer of a parquet file: its row groups and schema."""

    file: str
    schema: pa.Schema
    groups: tuple[tuple[int, int], ...]  # (rows, decompressed bytes) of each row group

    @staticmethod
    def read(file: str) -> Footer:
        """Reads the footer of `file`, a path or an fsspec url. Raises UserError: missing or damaged."""
        try:
            check_local(file)
            with fsspec.open(file, "rb") as stream:
                opened = open_table(stream)
                groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
        except READ_ERRORS as error:
            raise _damaged(file, error) from None
        return Footer(
            file,
            opened.schema.to_arrow_schema(),
            tuple((group.num_rows, group.total_byte_size) for group in groups),
        )

    def check(self, columns: Sequence[str], images: Sequence[str], label: str | None = None) -> None:
        """Checks the types of columns.

        Raises UserError: one of `columns` is missing, one of `images` holds no bytes or another column does, or the
        column `label` cannot hold numbers.
        """
        for name in columns:
            if self.schema.names.count(name) > 1:
                raise UserError(f"{self.file}: two columns are called '{name}'; rename one of them")
            if name not in self.schema.names:
                raise UserError(
                    f"{self.file}: has no column '{name}'; its columns are {', '.join(self.schema.names)}"
                )
            kind = self.schema.field(name).type
            if name in images and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) != (name in images):
                raise UserError(
                    f"{self.file}: column '{name}' holds {kind}; images, and only they, are stored as bytes"
                )
            if name == label and not _may_be_numbers(kind):
                raise UserError(
                    f"{self.file}: label column '{name}' holds {kind}, not class numbers from 0; name another column"
                )

    def class_names(self, label: str) -> list[str]:
        """Class names of a label column, which the hub's `datasets` stores in the schema's metadata; [] without any."""
        try:
            about = json.loads((self.schema.metadata or {})[b"huggingface"])
            return [str(name) for name in about["info"]["features"][label]["names"]]
        except (KeyError, ValueError, TypeError, RecursionError):
            return []


@dataclass(frozen=True)
class RowGroups:
    """Neighbouring row groups of one file."""

    file: str
    groups: tuple[int, ...]
    first_row: int  # number among all rows of all files
    num_rows: int
    num_bytes: int  # decompressed

    @property
    def name(self) -> str:
        """The file and its row groups in words, for messages."""
        return f"{redact(self.file)}, row groups {self.groups[0]} to {self.groups[-1]}"

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yields every row. Holds a few rows and a page of each column, which in the hub's files is often a row group.

        Raises UserError: damaged, or another number of rows than the footer says.
        """
        num_rows = 0
        try:
            check_local(self.file)
            with fsspec.open(self.file, "rb") as stream:
                opened = open_table(stream, checksums=True)
                for group in self.groups:
                    for batch in row_batches(opened, group, columns, ROWS_AT_ONCE):
                        num_rows += len(batch)
                        yield from batch
        except READ_ERRORS as error:
            raise _damaged(self.name, error) from None
        if num_rows != self.num_rows:
            raise _damaged(self.name, f"{num_rows} of {self.num_rows} rows")


def check_local(file: str) -> None:
    """Raises OSError: `file` is a local path and not a regular file."""
    if "://" not in file.removeprefix("file://"):
        limits.check_regular(file.removeprefix("file://"))


def find_parquet(paths: Sequence[str]) -> list[str]:
    """The parquet files that `paths` denote, in order. Raises UserError: no file, or a file given twice."""
    found = [file for path in paths for file in _expand(path)]
    if not found:
        raise UserError(f"{', '.join(paths)}: no parquet file there; give files, a folder or a glob")
    seen: set[str] = set()
    for file in found:
        local = file.removeprefix("file://")
        real = local if "://" in local else os.path.realpath(local)
        if real in seen:
            raise UserError(f"{file}: a parquet file is given twice; name each once")
        seen.add(real)
    return found


def _expand(path: str) -> list[str]:
    """The parquet files that a path denotes, sorted: a file, a folder with its subfolders, or a glob."""
    try:
        if Path(path).is_dir():
            there = below(Path(path)).files
            named = [name for name in there if name.endswith(".parquet")]
            tell_passed_over(path, [name for name in there if not name.endswith(".parquet")])
            return [f"{path.rstrip('/')}/{name}" for name in named]
        # Files are not looked up: over http a lookup could fetch the whole file.
        if path.endswith(".parquet") and "*" not in path:
            return [path]
        system, root = fsspec.core.url_to_fs(path)
        pattern = root if "*" in root else f"{root.rstrip('/')}/**/*.parquet"
        start = (
            len(PurePosixPath(pattern.partition("*")[0] + "x").parts) - 1
        )  # only names that the glob found can be hidden
        found = sorted(
            name
            for name in system.glob(pattern)
            if not any(map(is_hidden, PurePosixPath(name).parts[start:]))
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{path}: cannot be listed ({error}); give parquet files, a folder or a glob"
        ) from None
    return [str(system.unstrip_protocol(name)).removeprefix("file://") for name in found]


def in_units(footers: Sequence[Footer], max_rows: int) -> Iterator[RowGroups]:
    """Groups neighbouring row groups of one file: up to `max_rows` rows together, but at least one row group."""
    first_row = 0
    for footer in footers:
        start = 0
        while start < len(footer.groups):
            end = start + 1
            while (
                end < len(footer.groups)
                and sum(rows for rows, _ in footer.groups[start : end + 1]) <= max_rows
            ):
                end += 1
            num_rows, num_bytes = map(sum, zip(*footer.groups[start:end], strict=True))
            yield RowGroups(footer.file, tuple(range(start, end)), first_row, num_rows, num_bytes)
            first_row, start = first_row + num_rows, end


def _may_be_numbers(kind: pa.DataType) -> bool:
    """Whether a column's type can hold numbers. Text can ("9"); each row is checked when it is read."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return bool(is_text or is_number or pa.types.is_null(kind))


def _damaged(what: str, error: object) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UserError(f"{what}: cannot be read as parquet ({reason}); download it again or take it out")
