"""What a value of a table means as a number, and what text files are."""

from __future__ import annotations

import codecs
import decimal
from pathlib import Path

import numpy as np
import pytest

from base.config import UserError
from data.samples.captions import clean_text
from data.sources.table_values import number_in, whole_number_in
from data.sources.text_files import read_text, split_lines, without_mark


@pytest.mark.parametrize(
    "value", [9, 9.0, "9", " 9 ", "9.0", "+9", "9e0", decimal.Decimal(9), np.int64(9), np.float32(9)]
)
def test_what_means_nine_is_nine(value: object) -> None:
    assert number_in(value) == 9.0
    assert whole_number_in(value) == 9 and type(whole_number_in(value)) is int


@pytest.mark.parametrize(
    "value", [None, float("nan"), "", " ", "NaN", decimal.Decimal("nan"), np.float64("nan")]
)
def test_what_is_missing_is_none(value: object) -> None:
    assert number_in(value) is None and whole_number_in(value) is None


@pytest.mark.parametrize(
    "value",
    [
        *["N/A", "9,5", "1_000", "0x9", "inf", "1e999", "٩"],
        True,
        np.bool_(True),
        float("inf"),
        b"9",
        [9],
        {},
        "9" * 400,
        10**400,
    ],
)
def test_what_means_no_number_is_told(value: object) -> None:
    for read in (number_in, whole_number_in):
        with pytest.raises(ValueError, match="no number") as error:
            read(value)
        assert len(str(error.value)) < 80


@pytest.mark.parametrize("value", [2.5, "2.5", 1e300, 1 << 53, decimal.Decimal("0.1")])
def test_a_label_is_whole(value: object) -> None:
    assert number_in(value) is not None
    with pytest.raises(ValueError, match="no whole number"):
        whole_number_in(value)


def test_a_text_file_is_utf_8_with_or_without_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for payload in ("é\u2028x".encode(), codecs.BOM_UTF8 + "é\u2028x".encode()):
        path.write_bytes(payload)
        assert read_text(path) == "é\u2028x"
    for payload, words in (
        (b"caf\xe9", "not UTF-8"),
        ("x".encode("utf-16"), "UTF-16, not UTF-8"),
        ("x".encode("utf-16-le"), "zero bytes"),
    ):
        path.write_bytes(payload)
        with pytest.raises(UserError, match=words):
            read_text(path)
    (tmp_path / "folder").mkdir()
    for missing, words in (("gone", "No such file"), ("folder", "Is a directory")):
        with pytest.raises(UserError, match=words):
            read_text(tmp_path / missing)


def test_lines_end_where_they_end_in_json() -> None:
    assert split_lines('{"a": "x\u2028y"}\r\n{}\n') == ['{"a": "x\u2028y"}', "{}", ""]
    assert list(without_mark([codecs.BOM_UTF8 + b"a", codecs.BOM_UTF8 + b"b"])) == [
        b"a",
        codecs.BOM_UTF8 + b"b",
    ]


@pytest.mark.parametrize(
    "blank", ["", " \n", "\ufeff", "\u200b\u200d", "\u00a0\u2060", "\u00ad", "\ufe0f", "\u3164", "\u2800"]
)
def test_what_shows_nothing_is_no_text(blank: str) -> None:
    assert clean_text(blank) == ""
    assert clean_text(f"{blank}a{blank}").strip(blank) in ("a", "")


def test_a_text_keeps_what_joins_its_letters() -> None:
    firefighter, persian = "\U0001f469\u200d\U0001f692", "می\u200cخواهم"
    assert clean_text(f" \ufeff {firefighter} {persian}\u00a0\ufeff") == f"{firefighter} {persian}"
    assert clean_text("half \ud83d") == "half ?"
