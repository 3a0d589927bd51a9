"""Reads files of captions, one row an image: parquet, or one JSON object a line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow

from base import limits
from base.config import UserError
from data.samples.captions import read_object
from data.sources.parquet_reading import Row, open_table, row_batches
from data.sources.text_files import without_mark

BATCH_ROWS = 10_000


def batches(file: Path, columns: Sequence[str]) -> Iterator[tuple[Sequence[Row], float]]:
    """Yields the rows of a file, at most BATCH_ROWS at a time, and the share of the file read so far.

    Raises UserError: a damaged file, or a file of another kind.
    """
    if file.suffix == ".parquet":
        yield from _parquet_batches(file, columns)
    elif file.suffixes[-2:] == [".jsonl", ".gz"] or file.suffix == ".jsonl":
        yield from _jsonl_batches(file)
    else:
        raise UserError(f"{file}: not .parquet, .jsonl or .jsonl.gz; convert it to one of them")


def _parquet_batches(file: Path, columns: Sequence[str]) -> Iterator[tuple[Sequence[Row], float]]:
    try:
        table = open_table(str(file))
        there = [name for name in columns if name in table.schema_arrow.names]
        for group in range(table.num_row_groups):
            for batch in row_batches(table, group, there, BATCH_ROWS):
                yield batch, (group + 1) / table.num_row_groups
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{file}: damaged parquet file ({reason}); download it again") from None


def _jsonl_batches(file: Path) -> Iterator[tuple[Sequence[Row], float]]:
    found: list[Row] = []
    number, num_bytes = 0, max(1, file.stat().st_size)  # number: of the last line read
    try:
        with limits.open_file(file) as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            for line in without_mark(limits.lines(stream, file, packed_bytes=num_bytes)):
                number += 1
                if not line.strip():
                    continue
                found.append(read_object(line))
                if len(found) == BATCH_ROWS:
                    yield found, raw.tell() / num_bytes
                    found = []
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: damaged after line {number} ({reason}); download it again") from None
    except ValueError as error:
        raise UserError(f"{file}: line {number} is no JSON object ({error}); download it again") from None
    yield found, 1.0
