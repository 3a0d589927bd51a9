"""No command of make_shards takes a file as input that it would overwrite."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest

from base.config import UserError
from launch.runs.shard_sources import SOURCES, SourceOptions, write

ROLES = {"tars", "captions", "labels", "files"}
"""Fields that name files to read, unless they are of another type: columns, a switch."""


def inputs_of(source: type[SourceOptions]) -> dict[str, bool]:
    """Field -> whether it takes several, of the fields that name files."""
    hints = {name: hint for name, hint in typing.get_type_hints(source).items() if name in ROLES}
    return {
        name: typing.get_origin(hint) is tuple
        for name, hint in hints.items()
        if "Path" in str(hint) or name == "files"
    }


@pytest.mark.parametrize(
    ("command", "field"),
    [(command, name) for command, source in SOURCES.items() for name in inputs_of(source)],
)
def test_an_input_that_would_be_overwritten_is_refused(command: str, field: str, tmp_path: Path) -> None:
    source, out = SOURCES[command], tmp_path / "out"
    out.mkdir()
    kept = out / "shard-000000.parquet"
    kept.write_bytes(b"a person's")
    others: dict[str, Any] = {"tars": tmp_path / "a", "captions": tmp_path / "b", "files": "c"}
    given: dict[str, Any] = {
        name: (others[name],) if is_several else others[name]
        for name, is_several in inputs_of(source).items()
        if name in others
    }
    given |= {"images": tmp_path / "images"} if command == "folder" else {}
    named = str(kept) if field == "files" else kept
    given[field] = (named,) if inputs_of(source)[field] else named
    with pytest.raises(UserError, match=r"shard-000000\.parquet: is input, and would be overwritten"):
        write(source(out=out, **given))
    assert [path.name for path in out.iterdir()] == [kept.name] and kept.read_bytes() == b"a person's"
