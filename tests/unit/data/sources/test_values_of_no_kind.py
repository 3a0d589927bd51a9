"""Values that a format can hold and Python or the file system cannot: one line each (found by the fuzz run)."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from base.config import UserError
from data.sources.caption_files import batches
from evaluation.prompt_sets import write_imgedit


def test_a_time_that_python_cannot_say_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([2**62 + 1], pa.timestamp("ns"))}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: damaged parquet file \(Nanosecond"):
        list(batches(tmp_path / "t.parquet", ["text"]))


def test_a_name_longer_than_names_are_is_one_line(tmp_path: Path) -> None:
    row = {"id": "a.png" * 100, "prompt": "p", "edit_type": "add"}
    (tmp_path / "e.json").write_text(json.dumps({"1": row}))
    with pytest.raises(UserError, match="no such file; unpack"):
        write_imgedit(tmp_path / "e.json", tmp_path, tmp_path / "out")
