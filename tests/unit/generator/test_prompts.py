"""Files of prompts: what is read, which seeds images get, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from base.config import UserError
from generator.prompts import read_prompts


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path) -> None:
    prompts = read_prompts(lines(tmp_path / "p.txt", "a red apple", "", "  ein grüner Käfer "))
    assert [(p.key, p.text, p.images, p.meta) for p in prompts] == [
        ("00000", "a red apple", (), {"prompt": "a red apple"}),
        ("00001", "ein grüner Käfer", (), {"prompt": "ein grüner Käfer"}),
    ]


def test_a_line_ends_at_a_line_feed_alone_and_a_byte_order_mark_is_no_text(tmp_path) -> None:
    text = "a red\u2028apple\x85"  # valid inside JSON; str.splitlines() would split there
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    path = tmp_path / "p.jsonl"
    path.write_text(f"\ufeff{row}\r\n{row}\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == [text, text]


def test_objects_draw_or_edit_and_pass_on_what_else_they_say(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    prompts = read_prompts(
        lines(
            tmp_path / "p.jsonl",
            {"prompt": "a cup", "tag": "single", "key": "cup", "seed": 7},
            {"image": "a.png", "instruction": "fill it", "prompt": "a full cup", "key": 12},
            {"image": [str(tmp_path / "a.png"), "b.png"], "instruction": "put both on a table"},
        )
    )
    assert [p.key for p in prompts] == ["cup", "12", "00002"] and [p.seed for p in prompts] == [7, None, None]
    assert [p.text for p in prompts] == ["a cup", "fill it", "put both on a table"]
    assert [len(p.images) for p in prompts] == [0, 1, 2] and prompts[2].images[1] == tmp_path / "b.png"
    assert prompts[0].meta == {"prompt": "a cup", "tag": "single"}
    assert prompts[1].meta == {"instruction": "fill it", "prompt": "a full cup"}


def test_a_seed_is_that_of_the_item_wherever_it_stands(tmp_path) -> None:
    first = read_prompts(
        lines(tmp_path / "p.jsonl", {"prompt": "a", "key": "x"}, {"prompt": "b", "key": "y"})
    )
    other = read_prompts(lines(tmp_path / "q.jsonl", {"prompt": "b", "key": "y"}, {"prompt": "c", "seed": 5}))
    assert first[1].image_seed(3, 0) == other[0].image_seed(3, 0)
    seeds = {p.image_seed(number, seed) for p in first for number in range(4) for seed in range(2)}
    assert len(seeds) == 16 and all(0 <= seed < 1 << 32 for seed in seeds)
    assert [other[1].image_seed(number, 99) for number in range(3)] == [5, 6, 7]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ({"prompt": " "}, "'prompt' that is not empty"),
        ({"instruction": "fill it"}, "no 'image' needs a 'prompt'"),
        ({"prompt": "x", "image": "good.png"}, "needs a 'instruction'"),
        ({"instruction": "x", "image": "none.png"}, "none.png: no such file"),
        ({"instruction": "x", "image": 3}, "'image' is the name"),
        ({"prompt": "x", "key": "../x"}, "key '../x'"),
        ({"prompt": "x", "key": "ok"}, "stands there twice"),
        ({"prompt": "x", "key": [1]}, "key"),
        ({"prompt": "x", "seed": -1}, "seed -1"),
        ({"prompt": "x", "seed": True}, "seed True"),
        ({"prompt": "x", "seed": 1 << 32}, "seed"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words) -> None:
    (tmp_path / "good.png").write_bytes(b"")
    path = lines(tmp_path / "p.jsonl", {"prompt": "fine", "key": "ok"}, line)
    with pytest.raises(UserError, match=words) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path, words in (
        (tmp_path / "none.txt", "cannot be read"),
        (tmp_path / "latin.txt", "cannot be read as text"),
        (lines(tmp_path / "p.csv", "x"), "give a .txt file"),
        (lines(tmp_path / "empty.txt", "", " "), "holds no prompts"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_prompts(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
