"""Values that a format can hold and Python or the file system cannot: one line each (found by the fuzz run)."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from base.config import UserError
from data.sources.caption_files import batches
from data.sources.webdataset import WebDatasetSource
from evaluation.prompt_sets import write_imgedit
from report.watch.status import duration


def test_a_time_that_python_cannot_say_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([2**62 + 1], pa.timestamp("ns"))}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: damaged parquet file \(Nanosecond"):
        list(batches(tmp_path / "t.parquet", ["text"]))


def test_a_name_longer_than_names_are_is_one_line(tmp_path: Path) -> None:
    row = {"id": "a.png" * 100, "prompt": "p", "edit_type": "add"}
    (tmp_path / "e.json").write_text(json.dumps({"1": row}))
    with pytest.raises(UserError, match="no such file; unpack"):
        write_imgedit(tmp_path / "e.json", tmp_path, tmp_path / "out")


def test_a_length_in_a_header_that_is_none_is_shown_as_text(tmp_path: Path) -> None:
    header, content = tarfile.TarInfo("x"), b"\x89PNG\r\n\x1a\n 1=2\n"
    header.type, header.size = tarfile.XHDTYPE, len(content)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo("a.png"))
    source = WebDatasetSource([tmp_path / "a.tar"])
    with pytest.raises(UserError, match=r"a PAX header with '.*PNG\\r\\n.*' for a number") as error:
        list(source.items(0))
    assert "\n" not in str(error.value)


def test_a_time_that_no_log_can_mean_is_not_shown() -> None:
    assert [duration(seconds) for seconds in (math.inf, math.nan, 1e300)] == ["–"] * 3
    assert [duration(seconds) for seconds in (-math.inf, -5, 59.9, 7500)] == [
        "0 s",
        "0 s",
        "59 s",
        "2 h 05 min",
    ]
