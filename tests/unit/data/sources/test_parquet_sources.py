"""Parquet files with images in columns: the hub's schemas, OmniEdit, damage, bounded memory."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from base.config import UserError
from data.shards import Sample, ShardDataset
from data.sources.base import BadItemError
from data.sources.omniedit import OmniEditFilter, omniedit_source
from data.sources.parquet import OWN_FIELDS, ParquetColumns, ParquetSource
from data.sources.write import Workers, write_sources

HUB_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CAPTIONED = ParquetColumns(image="image", captions=("text",))


def picture(seed: int, kind: str = "jpeg", size: tuple[int, int] = (24, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def hub(payload: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": payload, "path": path}


def items(source: ParquetSource) -> list[Sample | BadItemError]:
    found = []
    for number, unit in enumerate(source.units):
        found += list(source.items(number))
        assert unit.num_items is not None and sum(
            u.num_items or 0 for u in source.units[: number + 1]
        ) == len(found)
    return found


def reasons(source: ParquetSource) -> dict[str, str]:
    return {item.key: item.reason for item in items(source) if isinstance(item, BadItemError)}


def metas(source: ParquetSource) -> list[dict[str, Any]]:
    return [json.loads(item.parts["json"]) for item in items(source) if isinstance(item, Sample)]


def write_captioned(path: Path, numbers: range, row_group_size: int = 4) -> str:
    table = pa.table(
        {
            "image": pa.array([hub(picture(number)) for number in numbers], HUB_IMAGE),
            "text": [f"text {number}" for number in numbers],
            "unused": [bytes(10)] * len(numbers),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def test_units_are_row_groups_and_never_cross_files(tmp_path: Path) -> None:
    paths = [
        write_captioned(tmp_path / "a.parquet", range(10)),
        write_captioned(tmp_path / "b.parquet", range(10, 14)),
    ]
    source = ParquetSource(paths, CAPTIONED, 8)
    assert [unit.num_items for unit in source.units] == [8, 2, 4]
    assert [unit.num_items for unit in ParquetSource(paths, CAPTIONED, 3).units] == [4, 4, 2, 4], (
        "groups stay whole"
    )
    samples = [item for item in items(source) if isinstance(item, Sample)]
    assert [sample.key for sample in samples] == [f"row-{number:09d}" for number in range(14)]
    assert [sample.parts["jpg"] for sample in samples] == [picture(number) for number in range(14)]
    assert metas(source) == [{"caption": f"text {number}"} for number in range(14)]
    assert ParquetSource(paths, CAPTIONED, 3).description != source.description


def test_files_are_found_in_folders_globs_and_urls(tmp_path: Path) -> None:
    for name, numbers in (("data/train-0.parquet", range(3)), ("data/train-1.parquet", range(3, 5))):
        write_captioned(tmp_path / name, numbers)
    write_captioned(tmp_path / "data/validation-0.parquet", range(9))
    everything = ParquetSource([str(tmp_path)], CAPTIONED, 100)
    train = ParquetSource([str(tmp_path / "data/train-*.parquet")], CAPTIONED, 100)
    url = ParquetSource([f"file://{tmp_path}/data/train-*.parquet"], CAPTIONED, 100)
    assert sum(unit.num_items or 0 for unit in everything.units) == 14
    assert [unit.num_items for unit in train.units] == [3, 2]
    assert (train.description, train.units) == (url.description, url.units)
    with pytest.raises(UserError, match="no parquet file there"):
        ParquetSource([str(tmp_path / "none")], CAPTIONED, 100)
    with pytest.raises(UserError, match=r"gone\.parquet: cannot be read as parquet"):
        ParquetSource([str(tmp_path / "gone.parquet")], CAPTIONED, 100)
    with pytest.raises(UserError, match=r"ftb://x/\*: cannot be listed"):
        ParquetSource(["ftb://x/*"], CAPTIONED, 100)


def test_remote_files_are_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    payload = Path(write_captioned(tmp_path / "a.parquet", range(6))).read_bytes()
    with fsspec.open("memory://bucket/a.parquet", "wb") as file:
        file.write(payload)
    assert len(metas(ParquetSource(["memory://bucket/*.parquet"], CAPTIONED, 100))) == 6


def test_hub_imagenet_gives_labels_and_class_names(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    table = pa.table(
        {
            "image": pa.array([hub(picture(n), f"n{n}.JPEG") for n in range(4)], HUB_IMAGE),
            "label": pa.array([1, 0, -1, 2], pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": about})
    pq.write_table(table, tmp_path / "train.parquet")
    columns = ParquetColumns(image="image", label="label")
    source = ParquetSource([str(tmp_path)], columns, 10)
    assert metas(source) == [{"label": 1, "class": "goldfish"}, {"label": 0, "class": "tench"}]
    assert reasons(source) == {
        "row-000000002": "no label: -1",
        "row-000000003": "no label: 2, there are 2 classes",
    }
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "train.parquet")
    assert metas(ParquetSource([str(tmp_path)], columns, 10)) == [{"label": 1}, {"label": 0}, {"label": 2}]


def test_columns_become_keys_kinds_of_captions_and_fields(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": ["cat-1", "a/b.c", None],
            "picture": pa.array([picture(n, "png") for n in range(3)], pa.large_binary()),
            "alt": ["x", None, " "],
            "long": [["no text"], None, None],
            "llava": ["x y", "z", "w"],
            "score": [1.5, math.nan, None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    columns = ParquetColumns(image="picture", captions=("alt", "llava"), key="id", kept=("score",))
    samples = [
        item for item in items(ParquetSource([str(tmp_path)], columns, 10)) if isinstance(item, Sample)
    ]
    assert {sample.key: json.loads(sample.parts["json"]) for sample in samples} == {
        "cat-1": {"captions": {"alt": "x", "llava": "x y"}, "score": 1.5},
        "row-000000001": {"captions": {"llava": "z"}, "source_key": "a/b.c"},
        "row-000000002": {"captions": {"llava": "w"}},
    }
    one = ParquetSource([str(tmp_path)], ParquetColumns(image="picture", captions=("long",)), 10)
    assert metas(one) == [{"captions": ["no text"]}]
    assert reasons(one)["row-000000001"] == "no caption: empty in long"


@pytest.mark.parametrize("again", ["in/a.parquet", "in", "*/*.parquet", "in/../in/a.parquet", "link.parquet"])
def test_file_given_twice_is_refused(tmp_path: Path, again: str) -> None:
    path = write_captioned(tmp_path / "in/a.parquet", range(3))
    (tmp_path / "link.parquet").symlink_to(path)
    for other in (f"{tmp_path}/{again}", f"file://{tmp_path}/{again}"):
        with pytest.raises(UserError, match="a parquet file is given twice; name each once"):
            ParquetSource([path, other], CAPTIONED, 10)


def test_kept_columns_are_json_that_everybody_reads(tmp_path: Path) -> None:
    rows = {"scores": [[1.5, math.nan], [math.inf]], "about": [{"x": math.nan, "y": 0.1}, None]}
    images = pa.array([hub(picture(n)) for n in range(2)], HUB_IMAGE)
    pq.write_table(pa.table({"image": images, "text": ["a", "b"], **rows}), tmp_path / "a.parquet")
    columns = ParquetColumns(image="image", captions=("text",), kept=("scores", "about"))
    found = items(ParquetSource([str(tmp_path)], columns, 10))
    payloads = [item.parts["json"] for item in found if isinstance(item, Sample)]
    assert [json.loads(payload, parse_constant=pytest.fail) for payload in payloads] == [
        {"caption": "a", "scores": [1.5, None], "about": {"x": None, "y": 0.1}},
        {"caption": "b", "scores": [None]},
    ]


def test_rows_without_image_or_caption_are_named(tmp_path: Path) -> None:
    images = [hub(None, "elsewhere.jpg"), None, hub(b""), hub(b"GIF89a"), hub(picture(4)), hub(picture(5))]
    texts = ["a", "b", "c", "d", None, "  "]
    pq.write_table(pa.table({"image": pa.array(images, HUB_IMAGE), "text": texts}), tmp_path / "a.parquet")
    found = reasons(ParquetSource([str(tmp_path)], CAPTIONED, 10))
    assert [found[f"row-{number:09d}"] for number in range(6)] == [
        *["no image: column 'image' is empty"] * 3,
        "unreadable image: column 'image': neither PNG, JPEG nor WebP",
        *["no caption: empty in text"] * 2,
    ]


def test_wrong_columns_are_refused_with_those_there_are(tmp_path: Path) -> None:
    path = write_captioned(tmp_path / "a.parquet", range(3))
    with pytest.raises(
        UserError, match=r"a\.parquet: has no column 'txt'; its columns are image, text, unused"
    ):
        ParquetSource([path], ParquetColumns(image="image", captions=("txt",)), 10)
    with pytest.raises(UserError, match="column 'text' holds string; images"):
        ParquetSource([path], ParquetColumns(image="text", captions=("text",)), 10)
    with pytest.raises(UserError, match="column 'unused' holds binary; images"):
        ParquetSource([path], ParquetColumns(image="image", captions=("text",), kept=("unused",)), 10)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"image": "a"},
        {"source": "a", "instruction": "b"},
        {"source": "a", "target": "b"},
        {"source": "a", "target": "b", "instruction": "c", "image": "d"},
        {"source": "a", "target": "b", "instruction": "c", "captions": ("d",)},
        {"image": "a", "captions": ("b",), "instruction": "c"},
        *({"image": "a", "captions": ("b",), "kept": ("score", name)} for name in OWN_FIELDS),
        {"source": "a", "target": "b", "instruction": "c", "kept": ("caption",)},
    ],
)
def test_columns_that_make_no_sample_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="parquet columns: "):
        ParquetColumns(**columns)


@pytest.mark.parametrize("damage", ["cut", "footer", "empty", "html"])
def test_file_with_a_damaged_footer_is_named_before_anything_is_written(tmp_path: Path, damage: str) -> None:
    path = Path(write_captioned(tmp_path / "a.parquet", range(10)))
    payload = bytearray(path.read_bytes())
    if damage == "footer":
        start = len(payload) - 8 - int.from_bytes(payload[-8:-4], "little")
        payload[start : start + 200] = bytes(200)
    spoiled = {"cut": payload[:-100], "footer": payload, "empty": b"", "html": b"<html>not found</html>"}[
        damage
    ]
    path.write_bytes(spoiled)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet") as error:
        ParquetSource([str(path)], CAPTIONED, 8)
    assert "\n" not in str(error.value)


def test_unit_of_a_damaged_row_group_is_named_and_all_others_are_written(tmp_path: Path) -> None:
    """A run of zeros in the middle, as a failed download leaves it."""
    good, bad = (Path(write_captioned(tmp_path / f"in/{name}.parquet", range(12))) for name in "ab")
    payload = bytearray(bad.read_bytes())
    start = pq.ParquetFile(bad).metadata.row_group(1).column(0).dictionary_page_offset
    payload[start : start + 300] = bytes(300)
    bad.write_bytes(payload)
    source = ParquetSource([str(good), str(bad)], CAPTIONED, 4)
    with pytest.raises(UserError, match=r"1 of 6 inputs .*b\.parquet, row groups 1 to 1: cannot be read"):
        write_sources({tmp_path / "out": source}, Workers(2))
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5


def omniedit_rows(number: int) -> dict[str, Any]:
    """The columns of TIGER-Lab/OmniEdit-Filtered-1.2M."""
    return {
        "omni_edit_id": f"task_obj_add_{number}",
        "task": ["addition", "removal", "style"][number % 3],
        "src_img": hub(picture(2 * number, "png"), f"{number}_src.png"),
        "edited_img": hub(picture(2 * number + 1), None),
        "edited_prompt_list": [f"Add {number}", f"Add object {number} to the scene"],
        "width": 24,
        "height": 24,
        "sc_score_1": 8 + number % 3,
        "sc_score_2": 10,
        "pq_score": 9,
        "o_score": [9.486833, 8.0, None][number % 3],
        "sc_reasoning": "The edit was done.",
        "pq_reasoning": "It looks well.",
    }


@pytest.fixture
def omniedit(tmp_path: Path) -> list[str]:
    schema = pa.schema(
        [
            *[(name, pa.string()) for name in ("omni_edit_id", "task", "sc_reasoning", "pq_reasoning")],
            *[(name, HUB_IMAGE) for name in ("src_img", "edited_img")],
            ("edited_prompt_list", pa.list_(pa.string())),
            *[(name, pa.int64()) for name in ("width", "height", "sc_score_1", "sc_score_2", "pq_score")],
            ("o_score", pa.float64()),
        ]
    )
    rows = [omniedit_rows(number) for number in range(7)]
    rows[6]["edited_prompt_list"] = []
    pq.write_table(
        pa.Table.from_pylist(rows, schema), tmp_path / "train-00000-of-00571.parquet", row_group_size=3
    )
    return [str(tmp_path)]


def test_omniedit_gives_edits_with_instructions_task_and_scores(omniedit: list[str]) -> None:
    source = omniedit_source(omniedit, 4)
    samples = [item for item in items(source) if isinstance(item, Sample)]
    assert [unit.num_items for unit in source.units] == [3, 4]
    assert sorted(samples[0].parts) == ["json", "source.png", "target.jpg"]
    assert samples[3].parts["source.png"] == picture(6, "png") and samples[3].parts["target.jpg"] == picture(
        7
    )
    assert json.loads(samples[0].parts["json"]) == {
        "instructions": ["Add 0", "Add object 0 to the scene"],
        "omni_edit_id": "task_obj_add_0",
        "task": "addition",
        "sc_score_1": 8,
        "sc_score_2": 10,
        "pq_score": 9,
        "o_score": 9.486833,
    }
    assert "o_score" not in json.loads(samples[2].parts["json"])
    assert reasons(source) == {"row-000000006": "no instruction: column 'edited_prompt_list' is empty"}


def test_omniedit_is_filtered_by_score_and_task_and_says_so(omniedit: list[str], tmp_path: Path) -> None:
    wanted = OmniEditFilter({"o_score": 9}, ("addition", "style"))
    source = omniedit_source(omniedit, 4, wanted)
    assert "o_score >= 9" in source.description and "addition, style" in source.description
    assert "TIGER-Lab" in source.description and "MIT" in source.description
    out = tmp_path / "out"
    ledger = write_sources({out: source})[out]
    assert str(ledger) == "read 7 = written 2 + rejected 5 (task 2, score 2, no instruction 1)"
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines[:2]} == {"task: removal", "score: o_score is None, below 9"}
    assert len(ShardDataset.open(out)) == 2
    with pytest.raises(UserError, match=r"no score 'score'.*o_score"):
        OmniEditFilter({"score": 9})


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """One row group of 100 MB of images; the reader may hold far less. In a process of its own, for its peak."""
    random = np.random.default_rng(0)
    payloads = [b"\xff\xd8\xff" + random.bytes(1_000_000) for _ in range(100)]
    table = pa.table({"image": pa.array(payloads, pa.binary()), "text": ["x"] * 100})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=4)  # pages of 4 MB
    script = f"""
from pathlib import Path
from data.sources.parquet import ParquetColumns, ParquetSource
def kib(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0])
source = ParquetSource([{str(tmp_path)!r}], ParquetColumns(image="image", captions=("text",)), 10)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kib("VmRSS")
assert sum(len(item.parts["jpg"]) for item in source.items(0)) == 100 * 1_000_003
print(kib("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 120_000  # KiB: measured 85,000, and 179,000 where columns are read whole


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    image, other = pa.array([b"x"]), pa.array(["y"])
    table = pa.Table.from_arrays([image, other, other], names=["image", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: two columns are called 'text'"):
        ParquetSource([str(tmp_path)], ParquetColumns(image="image", captions=("text",)), 2)
