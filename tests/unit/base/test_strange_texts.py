"""Texts, tokenizers, tensors and answers of strangers: used, mended, or refused in one line; never a traceback."""

from __future__ import annotations

import io
import json
import pickletools
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from base.config import UserError
from data.samples.captions import check_whole, half_character, mended, read_captions
from data.samples.text import CONFIG_NAME, MODEL_NAME, _config, load_text_tokenizer, train_text_tokenizer
from data.shards import Sample
from data.shards.quarantine import read_quarantine
from data.sources.caption_table import CaptionTable
from data.sources.parquet import ParquetColumns, ParquetSource
from evaluation.judge_instructions import EDIT_PROMPT, ImgEditInstructions
from evaluation.judges import vision_language
from evaluation.judges.interface import EDITSCORE
from evaluation.metrics.vie import read_scores
from evaluation.store import RecordStore
from generator.prompts import read_prompts
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.training.perceptual import LpipsVgg16

DEEP = "[" * 100_000
CAPTIONS = ["a red apple on blue", "two dogs beside a small green house"]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def one_line(error: pytest.ExceptionInfo[BaseException], *names: str) -> None:
    line = str(error.value)
    line.encode()  # it can be printed and written down
    assert "\n" not in line and all(name in line for name in names), line


# --- halves of characters


def test_one_rule_tells_whole_texts_from_others() -> None:
    assert half_character("a \U0001f34e") is None and half_character("a \ud83d b") == 2
    assert mended("a \ud83d b") == "a ? b" and mended("a \U0001f34e") == "a \U0001f34e"
    with pytest.raises(UserError, match=r"here 'a \\ud83d': half a character at position 2") as error:
        check_whole("a \ud83d", "here")
    one_line(error)


@pytest.mark.parametrize(
    "row", ['{"prompt": "a \\ud83d dog"}', '{"image": "a.png", "instruction": "\\udc00 x"}']
)
def test_a_prompt_with_half_a_character_is_refused_with_its_row(row: str, tmp_path: Path) -> None:
    """It was drawn with "?" in that place, and scored as if that had been asked for."""
    written(tmp_path / "a.png", b"")
    path = written(tmp_path / "p.jsonl", f'{{"prompt": "a cat"}}\n{row}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: '(prompt|instruction)' .*half a character") as error:
        read_prompts(path)
    one_line(error)


def test_a_judges_sentence_with_half_a_character_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.json", json.dumps({"add": f"\ud800 {EDIT_PROMPT}"}))
    with pytest.raises(UserError, match="half a character") as error:
        ImgEditInstructions.read(path)
    one_line(error, "prompts.json", "'add'")


def test_a_judge_of_this_machine_is_not_asked_with_half_a_character() -> None:
    judge = object.__new__(vision_language.TransformersJudge)
    judge._decoding = EDITSCORE
    with pytest.raises(UserError, match=r"a question .*half a character") as error:
        judge([], "a \ud83d", 0)
    one_line(error)


# --- JSON nested too deep


def test_deep_json_is_not_told_as_a_missing_caption() -> None:
    sample = Sample("k", {"json": DEEP.encode()}, "shard-000000.tar")
    with pytest.raises(UserError, match=r"k.*but bad json \(nested too deep\)"):
        read_captions(sample)
    with pytest.raises(UserError, match="no json with one of"):
        read_captions(Sample("k", {}, "shard-000000.tar"))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "records of a judge": ("records-00000.jsonl", lambda path: RecordStore(path.parent)),
    "quarantine": ("q.jsonl", read_quarantine),
    "prompts": ("p.jsonl", read_prompts),
    "text tokenizer": (CONFIG_NAME, lambda path: load_text_tokenizer(str(path.parent))),
}


@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_deep_json_is_one_line_in_every_reader_of_lines(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    written(tmp_path / MODEL_NAME, b"x")
    for content in (f"{DEEP}\n", '{"item": "a", "pass": Infinity, "config": "c", "value": 1}\n', "[[[]]]\n"):
        path = written(tmp_path / name, content)
        with pytest.raises(UserError) as error:
            read(path)
        one_line(error, name)


@pytest.mark.parametrize("inside", [DEEP, "9" * 5000, "1, " + "9" * 400, "1e999, 1", "NaN, 1", '{"a": 1}, 2'])
def test_scores_of_an_answer_that_are_none_are_not_read(inside: str) -> None:
    assert read_scores(f'{{"score": [{inside}]}}', 25) is None
    assert read_scores('{"score": [3, 4.5]}', 25) == (3, 4.5)


def test_a_table_of_captions_that_says_nothing_about_itself_is_refused(tmp_path: Path) -> None:
    import sqlite3

    for content in (DEEP, None):
        path = tmp_path / f"{content is None}.sqlite"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE identity (json TEXT)")
            connection.executemany("INSERT INTO identity VALUES (?)", [(content,)] if content else [])
        connection.close()
        with pytest.raises(UserError, match="not a caption table"):
            CaptionTable(path)


# --- files of models


def test_a_text_tokenizer_of_noise_is_one_line(tmp_path: Path) -> None:
    """A model that is damaged anywhere is refused when it is loaded, or works."""
    train_text_tokenizer(CAPTIONS, tmp_path / "good", 400)
    good, rng = (tmp_path / "good" / MODEL_NAME).read_bytes(), random.Random(0)
    (tmp_path / "bad").mkdir()
    refused = 0
    for number in range(120):
        model = bytearray(good if number else b"")
        for _ in range(rng.randint(1, 20) if model else 0):
            model[rng.randrange(len(model))] = rng.randrange(256)
        model = model[: rng.randrange(len(model))] if number % 3 == 1 else model
        written(tmp_path / "bad" / MODEL_NAME, bytes(model))
        written(tmp_path / "bad" / CONFIG_NAME, json.dumps(_config(bytes(model))))
        try:
            tokenizer = load_text_tokenizer(str(tmp_path / "bad"))
        except UserError as error:
            assert "\n" not in str(error) and MODEL_NAME in str(error)
            refused += 1
        else:
            ids = tokenizer.encode(CAPTIONS[0])
            assert all(0 <= one < tokenizer.vocab_size for one in ids) and tokenizer.decode(ids)
    assert refused > 80


def archive(pickled: bytes) -> bytes:
    """A file as torch.save writes it, with other instructions in it."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(changed := io.BytesIO(), "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickled if name.endswith("data.pkl") else good.read(name))
    return changed.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_of_strange_opcodes_are_one_line(tmp_path: Path) -> None:
    buffer, rng, path = io.BytesIO(), random.Random(0), tmp_path / "a.pt"
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    opcodes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    refused = 0
    for number in range(400):
        pickled = b"".join(
            rng.choice(opcodes) + rng.randbytes(rng.randrange(3)) for _ in range(rng.randint(1, 7))
        )
        legacy = bytearray(buffer.getvalue())
        legacy[rng.randrange(len(legacy))] = rng.randrange(256)
        content = (archive(b"\x80\x02" + pickled + b"."), b"\x80\x02" + pickled + b".", bytes(legacy))[
            number % 3
        ]
        try:
            read_checkpoint(written(path, content))
        except UserError as error:
            assert "\n" not in str(error) and "a.pt" in str(error), content
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("content", [b"\x80\x02I.", b"<html>", archive(b"\x80\x02h\x07.")])
def test_vgg_weights_of_a_stranger_are_one_line(content: bytes, tmp_path: Path) -> None:
    network = object.__new__(LpipsVgg16)
    with pytest.raises(UserError, match=r"VGG16 weights .* cannot be had") as error:
        network.load_vgg16(str(written(tmp_path / "vgg.pth", content)), "give others")
    one_line(error, "vgg.pth", "give others")


@pytest.mark.parametrize(
    "tree", [{}, {"r": 0, "lora_alpha": 1}, {"r": "x", "lora_alpha": 1}, {"r": 2, "lora_alpha": []}]
)
def test_a_config_of_an_adapter_that_is_none_is_one_line(tree: object, tmp_path: Path) -> None:
    written(tmp_path / vision_language.ADAPTER_CONFIG, json.dumps(tree))
    written(tmp_path / vision_language.ADAPTER_WEIGHTS, b"")
    with pytest.raises(UserError) as error:
        vision_language.merge_adapter(torch.nn.Linear(2, 2), tmp_path)
    one_line(error, vision_language.ADAPTER_CONFIG)


# --- tables


def table(path: Path, *columns: tuple[str, list[object]], about: bytes = b"{}") -> Path:
    arrays = [pa.array(values) for _, values in columns]
    schema = pa.schema([(name, array.type) for (name, _), array in zip(columns, arrays, strict=True)])
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema.with_metadata({"huggingface": about})), path)
    return path


def test_two_columns_of_one_name_are_told_where_one_of_them_is_wanted(tmp_path: Path) -> None:
    """pyarrow says of such a column that it does not exist."""
    wanted = ParquetColumns(image="image", captions=("caption",))
    image, text, other = ("image", [b"x"]), ("caption", ["a"]), ("other", ["b"])
    for columns in ((image, image, text), (image, text, text)):
        path = table(tmp_path / "a.parquet", *columns)
        with pytest.raises(UserError, match=r"two columns are called '(image|caption)'; rename one") as error:
            ParquetSource([str(path)], wanted, 5)
        one_line(error, "a.parquet")
    path = table(tmp_path / "a.parquet", image, text, other, other)
    assert len(ParquetSource([str(path)], wanted, 5).units) == 1


def test_notes_of_a_table_that_are_nested_deep_name_no_classes(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", ("image", [b"x"]), ("label", [1]), about=DEEP.encode())
    assert ParquetSource([str(path)], ParquetColumns(image="image", label="label"), 5).units
