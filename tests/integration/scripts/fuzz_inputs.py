"""What the fuzz run changes: a tiny valid input, who reads it, and what inputs are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Case:
    """An input and who reads it."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    pattern: str = "*"
    """Files that are changed."""
    sign: Callable[[Path], object] | None = None
    """Puts checksums right after a change, as who wants to deceive would."""


def png(side: int = 9, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, contents: dict[str, bytes | str | object]) -> None:
    """Files by name: bytes, text, or a value as JSON."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet_of(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


IMAGE = {"bytes": png(), "path": None}
