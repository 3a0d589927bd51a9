"""Files of captions, one row an image: parquet, or one JSON object a line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data.captions import read_object
from data.sources.text_files import without_mark
from engine.config import UserError

BATCH_ROWS = 10_000
Row = Mapping[str, Any]


def batches(file: Path, columns: Sequence[str]) -> Iterator[tuple[Sequence[Row], float]]:
    """Rows of a file, at most BATCH_ROWS at a time, and the share of it that is read then.

    Raises UserError: a damaged file, one of another kind.
    """
    if file.suffix == ".parquet":
        yield from _parquet_batches(file, columns)
    elif file.suffixes[-2:] == [".jsonl", ".gz"] or file.suffix == ".jsonl":
        yield from _jsonl_batches(file)
    else:
        raise UserError(f"{file}: not .parquet, .jsonl or .jsonl.gz; convert it to one of them")


def _parquet_batches(file: Path, columns: Sequence[str]) -> Iterator[tuple[Sequence[Row], float]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            there = [name for name in columns if name in parquet.schema_arrow.names]
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=there):
                    yield batch.to_pylist(), (group + 1) / parquet.num_row_groups
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: damaged parquet file ({reason}); download it again") from None


def _jsonl_batches(file: Path) -> Iterator[tuple[Sequence[Row], float]]:
    rows: list[Row] = []
    number, num_bytes = 0, max(1, file.stat().st_size)  # number: of the line
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            for line in without_mark(stream):
                number += 1
                if not line.strip():
                    continue
                rows.append(read_object(line))
                if len(rows) == BATCH_ROWS:
                    yield rows, raw.tell() / num_bytes
                    rows = []
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: damaged after line {number} ({error}); download it again") from None
    except ValueError as error:
        raise UserError(f"{file}: line {number} is no JSON object ({error}); download it again") from None
    yield rows, 1.0
