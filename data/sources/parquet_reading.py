"""Reads a parquet file's rows a few at a time, within limits: some 100 bytes can unpack to gigabytes.

Pages are compressed, and may repeat a dictionary's value in a bit or less. So footers are compared with the file's
size, texts are unpacked only after their lengths are summed up, and the number of images read at once is so small that
the size of their dictionary bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from base import limits

PAGE_BUFFER_BYTES = 1 << 20  # read-ahead in each column
MAX_VALUES_FREE = 1 << 26  # values allowed in a column of a row group, even if they take no bytes

Row = Mapping[str, Any]


def open_table(source: Any, *, checksums: bool = False) -> pq.ParquetFile:
    """Opens a file by path or an open file. Texts are read as dictionaries, so that reading does not unpack them.

    Raises OSError: not a regular file, or a column unpacks to too much; ValueError, pyarrow.ArrowException: damaged.
    """
    if isinstance(source, str):
        limits.check_regular(source)
    options = {"buffer_size": PAGE_BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": checksums}
    found = pq.ParquetFile(source, **options)
    _check(found)
    texts = [column.path for column in _columns(found) if str(column.logical_type) == "String"]
    return pq.ParquetFile(source, read_dictionary=texts, metadata=found.metadata, **options)


def row_batches(
    table: pq.ParquetFile, group: int, columns: Sequence[str], at_once: int
) -> Iterator[list[Row]]:
    """Yields a row group's rows, at most `at_once` at a time.

    Raises OSError: rows unpack to too much; pyarrow.ArrowInvalid: a value that Python cannot hold.
    """
    about = table.metadata.row_group(group)
    wanted = [about.column(number) for number in range(about.num_columns)]
    largest = max(
        (
            column.total_uncompressed_size  # no value of the column is longer
            for column in wanted
            if column.path_in_schema.partition(".")[0] in columns
            and column.physical_type == "BYTE_ARRAY"
            and any("DICTIONARY" in encoding for encoding in column.encodings)
            and not _is_text(table, column.path_in_schema)
        ),
        default=1,
    )
    few = max(1, min(at_once, limits.BATCH_BYTES // max(1, largest)))
    # No threads, because this runs in forked processes.
    for batch in table.iter_batches(few, row_groups=[group], columns=list(columns), use_threads=False):
        num_bytes = sum(_unfolded_bytes(column) for column in batch.columns)
        if num_bytes > limits.BATCH_BYTES:
            found = f"{len(batch)} rows unfold to {num_bytes:,} bytes"
            raise limits.too_large("", found, limits.BATCH_BYTES)
        plain = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            for column in batch.columns
        ]
        try:
            rows = pa.RecordBatch.from_arrays(plain, names=batch.schema.names).to_pylist()
        except (ValueError, OverflowError) as error:  # a time in nanoseconds that Python's times cannot say
            raise pa.ArrowInvalid(str(error)) from None
        yield rows


def _columns(table: pq.ParquetFile) -> list[Any]:
    return [table.schema.column(number) for number in range(len(table.schema))]


def _is_text(table: pq.ParquetFile, path: str) -> bool:
    return any(column.path == path and str(column.logical_type) == "String" for column in _columns(table))


def _check(table: pq.ParquetFile) -> None:
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        for number in range(about.num_columns):
            column = about.column(number)
            packed, most = column.total_compressed_size, limits.unfolded(column.total_compressed_size)
            where = f"column '{column.path_in_schema}' of row group {group}"
            if column.total_uncompressed_size > most:
                found = f"{where} unfolds to {column.total_uncompressed_size:,} bytes"
                raise limits.too_large("", found, most)
            if column.num_values > MAX_VALUES_FREE + limits.UNFOLD_RATIO * max(0, packed):
                raise limits.too_large("", f"{where} unfolds to {column.num_values:,} values", most)


def _unfolded_bytes(array: pa.Array) -> int:
    """Bytes of the values without dictionary encoding."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary) if len(array.dictionary) else pa.array([], pa.int32())
        found = pc.sum(pc.take(lengths.cast(pa.int64()), array.indices)).as_py()
        return int(found or 0)
    if pa.types.is_struct(array.type):
        return sum(map(_unfolded_bytes, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return int(array.nbytes - array.flatten().nbytes) + _unfolded_bytes(array.flatten())
    return int(array.nbytes)
