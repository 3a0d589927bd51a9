"""Rows of a parquet file, a few at a time, within limits: some 100 bytes can stand for gigabytes.

Pages are compressed, and repeat a value of their dictionary in a bit or less. So footers are compared with the file's
size, texts are unfolded only after their length was summed up, and so few images at once that their dictionary bounds
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from base import limits

PAGE_BUFFER_BYTES = 1 << 20  # read ahead in each column
MAX_VALUES_FREE = 1 << 26  # values of a column in a row group, however few bytes they take

Row = Mapping[str, Any]


def open_table(source: Any, *, checksums: bool = False) -> pq.ParquetFile:
    """A file by its path, or an open one. Texts come by their dictionaries, so that they are not unfolded by opening.

    Raises OSError: no regular file, a column that unfolds to too much; ValueError, pyarrow.ArrowException: damaged.
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
    """The rows of a row group, at most `at_once` at a time.

    Raises OSError: some that unfold to too much; pyarrow.ArrowInvalid: a value that Python cannot hold.
    """
    about = table.metadata.row_group(group)
    wanted = [about.column(number) for number in range(about.num_columns)]
    largest = max(
        (
            column.total_uncompressed_size  # no value of it is longer
            for column in wanted
            if column.path_in_schema.partition(".")[0] in columns
            and column.physical_type == "BYTE_ARRAY"
            and any("DICTIONARY" in encoding for encoding in column.encodings)
            and not _is_text(table, column.path_in_schema)
        ),
        default=1,
    )
    few = max(1, min(at_once, limits.BATCH_BYTES // max(1, largest)))
    # Without threads: this runs in forked processes.
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
    """Bytes of the values once they stand for themselves."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary) if len(array.dictionary) else pa.array([], pa.int32())
        found = pc.sum(pc.take(lengths.cast(pa.int64()), array.indices)).as_py()
        return int(found or 0)
    if pa.types.is_struct(array.type):
        return sum(map(_unfolded_bytes, array.flatten()))
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return int(array.nbytes - array.flatten().nbytes) + _unfolded_bytes(array.flatten())
    return int(array.nbytes)
