"""Parquet files with images in their columns -> samples: text-to-image, classes, edits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from base import files, limits
from base.config import UserError
from data.samples.captions import TEXT_FIELDS, read_object
from data.samples.images import image_suffix, part_name
from data.shards import Sample
from data.shards.index import KEY_PATTERN
from data.sources.base import BadItemError, Unit
from data.sources.config import ParquetConfig
from data.sources.parquet_files import Footer, find_parquet, in_units
from data.sources.parquet_reading import Row
from data.sources.prepare import select_texts
from data.sources.table_values import whole_number_in

FOOTERS_AT_ONCE = 16
OWN_FIELDS = (*TEXT_FIELDS, "label", "class", "source_key")  # fields of json that training reads


@dataclass(frozen=True)
class ParquetColumns(ParquetConfig):
    """The role of each column, checked: the columns make a sample."""

    def __post_init__(self) -> None:
        """Raises UserError: the columns make no sample."""
        is_edit = self.source is not None and self.target is not None
        if is_edit == (self.image is not None) or (self.source is None) != (self.target is None):
            raise UserError("parquet columns: give an image column, or a source and a target column")
        if is_edit and (self.instruction is None or self.captions or self.label is not None):
            raise UserError("parquet columns: an edit has an instruction column, no captions and no label")
        if not is_edit and (self.instruction is not None or not (self.captions or self.label is not None)):
            raise UserError("parquet columns: an image has caption columns or a label column")
        for name in self.kept:
            if name in OWN_FIELDS:
                raise UserError(
                    f"parquet columns: '{name}' cannot be kept, training would read it; name it as a column of "
                    "captions, instructions or labels, or leave it out"
                )

    @property
    def images(self) -> dict[str, str]:
        """Role ("", "source", "target") -> column."""
        named = {"": self.image, "source": self.source, "target": self.target}
        return {role: column for role, column in named.items() if column is not None}

    @property
    def names(self) -> list[str]:
        """All columns without repetition."""
        single = (self.instruction, self.label, self.key)
        named = (*self.images.values(), *self.captions, *filter(None, single), *self.kept)
        return list(dict.fromkeys(named))


class RowFilter(Protocol):
    """Decides which rows are rejected."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that the filter reads."""

    @property
    def description(self) -> str:
        """The filter in words, a part of the source's description."""

    def reason(self, row: Row) -> str | None:
        """Why the row is rejected, as "kind: detail"; None: the row is kept."""


class ParquetSource:
    """The rows of parquet files. A unit is neighbouring row groups of one file. Implements data.sources.base.Source."""

    def __init__(
        self,
        paths: Sequence[str],
        columns: ParquetColumns,
        max_samples_per_shard: int,
        *,
        name: str = "parquet",
        row_filter: RowFilter | None = None,
    ) -> None:
        """`paths`: files, folders and globs, local or fsspec urls. Reads every footer.

        Row groups are not divided: a row group with more rows than `max_samples_per_shard` makes a shard of its own.
        Raises UserError: no files, a damaged or repeated file, or a column that is missing or of the wrong type.
        """
        if max_samples_per_shard < 1:
            raise UserError(f"max_samples_per_shard is {max_samples_per_shard}; give at least 1")
        self._columns = columns
        self._filter = row_filter
        self._names = list(dict.fromkeys([*columns.names, *(row_filter.columns if row_filter else ())]))
        found = find_parquet(paths)
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            footers = list(pool.map(Footer.read, found))
        for footer in footers:
            footer.check(self._names, list(columns.images.values()), columns.label)
        self._class_names = [] if columns.label is None else footers[0].class_names(columns.label)
        self._row_groups = list(in_units(footers, max_samples_per_shard))
        self.units = [Unit(work.name, work.num_rows, work.num_bytes) for work in self._row_groups]
        listing = [[PurePosixPath(work.file).name, *astuple(work)[1:]] for work in self._row_groups]
        about = [f"{name}, {len(found)} files, listing {files.digest([listing, repr(columns)])[:12]}"]
        self.description = "; ".join([*about, *([row_filter.description] if row_filter else [])])

    def items(self, unit: int) -> Iterator[Sample | BadItemError]:
        """See Source. Raises UserError: a damaged file."""
        work = self._row_groups[unit]
        for number, row in enumerate(work.rows(self._names), work.first_row):
            try:
                item: Sample | BadItemError = self._sample(f"row-{number:09d}", row)
            except BadItemError as error:
                item = error
            yield item

    def _sample(self, number: str, row: Row) -> Sample:
        columns = self._columns
        key = number if columns.key is None or row[columns.key] is None else str(row[columns.key])
        kept = read_object(json.dumps({name: row[name] for name in columns.kept}, default=str).encode())
        fields = {name: value for name, value in kept.items() if value is not None}  # NaN has become null
        if not KEY_PATTERN.fullmatch(key):
            fields["source_key"], key = key, number
        reason = self._filter.reason(row) if self._filter is not None else None
        if reason is not None:
            raise BadItemError(key, reason)
        fields |= self._texts(key, row)
        if columns.label is not None:
            fields |= self._label(key, row[columns.label])
        parts = {"json": json.dumps(fields, sort_keys=True).encode()}
        for role, column in columns.images.items():
            payload = row[column]["bytes"] if isinstance(row[column], dict) else row[column]
            if not payload:
                raise BadItemError(key, f"no image: column '{column}' is empty")
            try:
                suffix = image_suffix(payload)
            except ValueError as error:
                raise BadItemError(key, f"unreadable image: column '{column}': {error}") from None
            parts[part_name(role, suffix)] = payload
        return Sample(key, parts)

    def _texts(self, key: str, row: Row) -> dict[str, Any]:
        columns = self._columns
        for name in filter(None, (columns.instruction, *columns.captions)):
            if isinstance(row[name], str) and len(row[name]) > limits.CAPTION_BYTES:
                found = f"no caption: column '{name}' holds {len(row[name]):,} letters"
                raise BadItemError(key, f"{found}, over the limit of {limits.CAPTION_BYTES:,}")
        if columns.instruction is not None:
            texts = select_texts(row[columns.instruction])
            if texts is None:
                raise BadItemError(key, f"no instruction: column '{columns.instruction}' is empty")
            return {"instructions": [texts] if isinstance(texts, str) else texts}
        if not columns.captions:
            return {}
        texts = select_texts(
            {column: row[column] for column in columns.captions}
            if len(columns.captions) > 1
            else row[columns.captions[0]]
        )
        if texts is None:
            raise BadItemError(key, f"no caption: empty in {', '.join(columns.captions)}")
        return {"caption" if isinstance(texts, str) else "captions": texts}

    def _label(self, key: str, value: object) -> dict[str, int | str]:
        try:
            label = whole_number_in(value)
        except ValueError as error:
            raise BadItemError(key, f"no label: column '{self._columns.label}' holds {error}") from None
        if label is None or label < 0:  # the hub's label -1 means none
            raise BadItemError(key, f"no label: {value}")
        if not self._class_names:
            return {"label": label}
        if label >= len(self._class_names):
            raise BadItemError(key, f"no label: {label}, there are {len(self._class_names)} classes")
        return {"label": label, "class": self._class_names[label]}
