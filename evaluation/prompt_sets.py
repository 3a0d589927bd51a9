"""Turns a benchmark's own files into a file of prompts or edits for launch/sample.py (generator/prompts.py).

Each line carries into the manifest what the suites need later: GenEval's clauses, DPG-Bench's item_id,
the group and instruction of an edit. GenEval's own file can be drawn from as it is.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files, limits
from base.config import UserError
from data.samples.images import image_suffix, read_rgb
from data.sources.parquet_files import READ_ERRORS, ROWS_AT_ONCE
from data.sources.parquet_reading import Row, open_table, row_batches
from evaluation.metrics.dpg import read_graphs
from generator.prompts import KEY_PATTERN

COMMAND = "prompts"
PROMPTS_NAME = "prompts.jsonl"
IMGEDIT_FIELDS = ("id", "prompt", "edit_type")
GEDIT_COLUMNS = ("key", "task_type", "instruction", "instruction_language", "input_image")


def write_dpg(table: Path, out: Path) -> int:
    """Writes one prompt for each item id of dpg_bench.csv; returns their number."""
    graphs = read_graphs(table)
    return _write(out, ({"key": key, "prompt": g.prompt, "item_id": key} for key, g in graphs.items()))


def write_gedit(tables: Sequence[Path], out: Path) -> int:
    """Writes the English rows of GEdit-Bench's parquet files, images beside the prompts; returns the number of rows.

    Raises UserError: no parquet files, other columns, an image that cannot be read.
    """
    files.claim(out, COMMAND, (PROMPTS_NAME, "images"))
    return _write(out, _gedit_rows(tables, out))


def write_imgedit(edits: Path, images: Path, out: Path) -> int:
    """Writes the edits of basic_edit.json, with images of folder `images` beside the prompts; returns their number.

    Raises UserError: another file, a missing image, an image outside the folder.
    """
    try:
        tree = files.read_json(edits)
        rows = {str(key): {name: str(row[name]) for name in IMGEDIT_FIELDS} for key, row in tree.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{edits}: is not ImgEdit-Bench's basic_edit.json (key -> {', '.join(IMGEDIT_FIELDS)})"
        ) from None
    originals = {key: _original(edits, images, row["id"]) for key, row in rows.items()}
    files.claim(out, COMMAND, (PROMPTS_NAME, "images"))
    return _write(out, (_imgedit_row(key, row, originals[key], out, edits) for key, row in rows.items()))


def _original(edits: Path, images: Path, name: str) -> Path:
    try:
        path = files.inside(images, name)
    except UserError as error:
        raise UserError(f"{edits}: {error}") from None
    if not files.is_file(path):
        raise UserError(f"{path}: no such file; unpack ImgEdit-Bench's images below {images}")
    return path


def _imgedit_row(key: str, row: Mapping[str, str], original: Path, out: Path, where: Path) -> dict[str, Any]:
    _check_key(key, where)
    try:
        payload = limits.read_bytes(original, limits.IMAGE_BYTES)
        name = f"images/{key}.{image_suffix(payload)}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{original}: no readable image ({reason})") from None
    files.write_bytes(out / name, payload)
    return {"key": key, "image": name, "instruction": row["prompt"], "edit_type": row["edit_type"]}


def _gedit_rows(tables: Sequence[Path], out: Path) -> Iterable[dict[str, Any]]:
    seen: set[str] = set()
    for path in tables:
        try:
            table = open_table(str(path))
        except READ_ERRORS as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"{path}: is no readable parquet file ({reason})") from None
        absent = [name for name in GEDIT_COLUMNS if name not in table.schema_arrow.names]
        if absent:
            raise UserError(f"{path}: has no {', '.join(absent)}; give the files of stepfun-ai/GEdit-Bench")
        for row in _table_rows(table, path):
            if row["instruction_language"] == "en":
                if str(row["key"]) in seen:
                    raise UserError(f"{path}: key '{row['key']}' stands there twice; keys must be unique")
                seen.add(str(row["key"]))
                yield _gedit_row(row, out, path)


def _table_rows(table: Any, path: Path) -> Iterator[Row]:
    try:
        for group in range(table.num_row_groups):
            for batch in row_batches(table, group, GEDIT_COLUMNS, ROWS_AT_ONCE):
                yield from batch
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as parquet ({reason}); download it again") from None


def _gedit_row(row: Mapping[str, Any], out: Path, where: Path) -> dict[str, Any]:
    key, image = row["key"], row["input_image"]
    _check_key(key, where)
    name = f"images/{key}.png"
    try:
        buffer = io.BytesIO()
        read_rgb(io.BytesIO(image["bytes"] if isinstance(image, Mapping) else image)).save(buffer, "PNG")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{where}: row '{key}' holds no readable input_image ({error})") from None
    files.write_bytes(out / name, buffer.getvalue())
    fields = {name: row[name] for name in ("key", "instruction", "task_type", "instruction_language")}
    return {**fields, "image": name}


def _check_key(key: object, where: Path) -> None:
    """Raises UserError: a key that cannot be a file name."""
    if not isinstance(key, str | int) or not KEY_PATTERN.fullmatch(str(key)):
        raise UserError(f"{where}: key {key!r} names a file; use letters, digits and _ + - . (not first)")


def _write(out: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    lines = [json.dumps(row) + "\n" for row in rows]
    files.claim(out, COMMAND, (PROMPTS_NAME,))
    files.write_text(out / PROMPTS_NAME, "".join(lines))
    return len(lines)
