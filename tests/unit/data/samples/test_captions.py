"""What a sample's json says is read in one way, and one that says nothing clear is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from base.config import UserError
from data.samples.captions import is_class_sample, read_captions, read_meta, read_object
from data.shards import Sample


def sample(payload: bytes | dict[str, Any]) -> Sample:
    payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return Sample("a", {"json": payload}, shard="set/shard-000003.tar")


def test_numbers_that_are_no_json_become_null() -> None:
    payload = b'{"a": NaN, "b": [Infinity, -Infinity, 1e999, 1.5, 0.1, 3]}'
    assert read_object(payload) == {"a": None, "b": [None, None, None, 1.5, 0.1, 3]}


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_anything_but_an_object_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError):
        read_object(payload)
    with pytest.raises(UserError, match=r"set/shard-000003.tar: sample 'a': bad json"):
        read_meta(sample(payload))
    with pytest.raises(UserError, match=r"set/shard-000003.tar: sample 'a': no json with one of"):
        read_captions(sample(payload))


@pytest.mark.parametrize("caption", [5, True, [5], {"alt": None}, [["x"]], {}])
def test_caption_that_is_no_text_is_named(caption: object) -> None:
    with pytest.raises(UserError, match="sample 'a': has an empty caption, or one that is no text"):
        read_captions(sample({"caption": caption}))


def test_null_is_no_caption() -> None:
    assert read_captions(sample({"caption": None, "captions": ["x"]})) == ["x"]
    assert is_class_sample(sample({"label": 3, "caption": None}))
    assert not is_class_sample(sample({"label": 3, "caption": "x"}))
    with pytest.raises(UserError, match="no json with one of"):
        read_captions(sample({"caption": None}))
