"""WebDataset tars as a source: damage is refused, nothing is left out without a word, texts and keys fit our shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from base.config import UserError
from data.shards import Sample, ShardDataset, ShardWriter
from data.sources.base import BadItemError
from data.sources.tar_file import TarReader
from data.sources.tar_samples import find_tars
from data.sources.webdataset import WebDatasetSource
from data.sources.write import write_sources
from helpers.trees import tar_of

BLOCK = 512


def picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (number % 256, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files, format))
    return path


def img2dataset(number: int, **changes: Any) -> list[tuple[str, bytes]]:
    """One sample as img2dataset 1.4 writes it."""
    key = f"{number:09d}"
    meta = {
        "caption": f"caption {number}",
        "url": f"http://example.org/{number}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "original_width": 240,
        "original_height": 160,
        "exif": '{"Image Make": "a camera"}',
        "sha256": f"{number:064x}",
        **changes,
    }
    return [
        (f"{key}.jpg", picture(number)),
        (f"{key}.json", json.dumps(meta).encode()),
        (f"{key}.txt", f"caption {number}".encode()),
    ]


def everything(source: WebDatasetSource) -> list[Sample | BadItemError]:
    return [item for unit in range(len(source.units)) for item in source.items(unit)]


def meta(item: Sample | BadItemError) -> dict[str, Any]:
    assert isinstance(item, Sample), item
    tree: dict[str, Any] = json.loads(item.parts["json"])
    return tree


def only(path: Path, parts: Mapping[str, bytes], **options: Any) -> Sample | BadItemError:
    """What becomes of a single sample."""
    write_tar(path / "one.tar", [(f"k.{part}", payload) for part, payload in parts.items()])
    (item,) = everything(WebDatasetSource([path / "one.tar"], **options))
    return item


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "00000.tar", [file for number in range(5) for file in img2dataset(number)])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(tmp_path: Path, format: int) -> None:
    files = [("a.txt", b""), ("d" * 90 + "/" + "n" * 80 + ".jpg", b"x" * 513), ("b.bin", bytes(1024))]
    if format != tarfile.USTAR_FORMAT:
        files += [("long/" * 60 + "Ünïcode.txt", b"y" * 512)]
    path = write_tar(tmp_path / "a.tar", files, format)
    with TarReader(path) as reader, tarfile.open(path) as expected:
        found = list(reader.members())
        members = expected.getmembers()
        assert [(m.name, m.offset, m.data_offset, m.num_bytes) for m in found] == [
            (m.name, m.offset, m.offset_data, m.size) for m in members
        ]
        assert [reader.payload(member) for member in found] == [payload for _, payload in files]


def test_a_pax_size_counts_more_than_the_header_s_own(tmp_path: Path) -> None:
    """As bsdtar writes members of 8 GiB and more."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.bin")
        info.pax_headers = {"size": "700", "path": "b.bin"}
        tar.addfile(info)
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(raw[: 3 * BLOCK] + b"z" * 700 + bytes(2 * BLOCK - 700 + 2 * BLOCK))
    with TarReader(tmp_path / "a.tar") as reader:
        (member,) = reader.members()
        assert (member.name, member.is_renamed, reader.payload(member)) == ("b.bin", True, b"z" * 700)


def test_a_truncation_anywhere_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    with tarfile.open(tar) as stock:
        last = stock.getmembers()[-1]
    end = last.offset_data + BLOCK  # where the end-of-archive marker starts
    source = WebDatasetSource([tar])
    for length in [*range(0, end + 2 * BLOCK, BLOCK), 100, end - 7, end + BLOCK + 1]:
        tar.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"00000\.tar: .*byte \d+.*download"):
            list(source.items(0))
    tar.write_bytes(whole[: end + 2 * BLOCK])  # the least that a whole tar has
    assert len(list(source.items(0))) == 5


def test_every_damaged_header_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    with tarfile.open(tar) as stock:
        offsets = [member.offset for member in stock.getmembers()]
    source = WebDatasetSource([tar])
    for offset in offsets:
        for place in (0, 100, 124, 148, 156, 257, 400):  # name, mode, size, checksum, kind, magic, prefix
            damaged = bytearray(whole)
            damaged[offset + place] ^= 1
            tar.write_bytes(damaged)
            with pytest.raises(UserError, match=f"damaged at byte {offset}"):
                list(source.items(0))
        # Two blocks look like the end of the archive; before the very end they are one.
        for num_blocks in (1,) if offset == offsets[-1] else (1, 2):
            tar.write_bytes(whole[:offset] + bytes(num_blocks * BLOCK) + whole[offset + num_blocks * BLOCK :])
            with pytest.raises(UserError, match=f"damaged at byte {offset}: a zeroed header"):
                list(source.items(0))


def test_a_file_whose_rest_was_never_written_is_refused(tar: Path) -> None:
    """A download into a file of the full size: zeros after a member look like the end marker."""
    with tarfile.open(tar) as stock:
        offset = stock.getmembers()[6].offset
    tar.write_bytes(tar.read_bytes()[:offset] + bytes(3 << 20))
    with pytest.raises(UserError, match=f"byte {offset}: .* never written"):
        list(WebDatasetSource([tar]).items(0))


@pytest.mark.parametrize("field", [b"-0000001000", b"+0000001000", b"000_0001000", b"0o000001000"])
def test_a_size_that_is_no_plain_octal_number_is_refused(tmp_path: Path, field: bytes) -> None:
    """A size of -512 would lead back to the same header for ever."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field + b"\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(header + bytes(2 * BLOCK))
    with TarReader(tmp_path / "a.tar") as reader, pytest.raises(UserError, match="damaged at byte 0"):
        next(reader.members())


def test_img2dataset_samples_keep_their_facts_and_drop_the_rest(tar: Path) -> None:
    items = everything(WebDatasetSource([tar]))
    assert [item.key for item in items] == [f"00000-{number:09d}" for number in range(5)]
    assert meta(items[3]) == {
        "caption": "caption 3",
        "url": "http://example.org/3.jpg",
        "key": "000000003",
        "source_key": "000000003",
        "width": 24,
        "height": 16,
        "original_width": 240,
        "original_height": 160,
        "sha256": f"{3:064x}",
    }
    assert isinstance(items[3], Sample)
    assert items[3].parts["jpg"] == picture(3)


def test_parts_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    files = [
        ("./", b""),
        ("./deep.er/a.JPG", picture(1)),
        ("./deep.er/a.txt", b"one"),
        ("./deep.er/b.jpeg", picture(2)),
        ("./deep.er/b.thumb.png", picture(3, "PNG")),
        ("./deep.er/b.txt", b"two"),
    ]
    path = write_tar(tmp_path / "t.tar", files[1:])
    stock = list(webdataset.WebDataset(str(path), shardshuffle=False))
    items = everything(WebDatasetSource([path]))
    assert [meta(item)["source_key"] for item in items] == [sample["__key__"] for sample in stock]
    assert [item.parts["jpg"] for item in items if isinstance(item, Sample)] == [
        stock[0]["jpg"],
        stock[1]["jpeg"],
    ]


def test_what_is_no_sample_is_named_not_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("k.jpg", tarfile.SYMTYPE),
            ("p.jpg", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("README"))
    items = everything(WebDatasetSource([tmp_path / "t.tar"]))
    reasons = [item.reason for item in items if isinstance(item, BadItemError)]
    assert reasons == [
        "not a sample: 'k.jpg' is a link or device",
        "not a sample: 'p.jpg' is a link or device",
        "not a sample: 'README' is no file name KEY.part",
    ]
    assert len(items) == 3


def test_members_of_a_sample_must_be_neighbours(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    with pytest.raises(UserError, match="'a' are not neighbours"):
        everything(WebDatasetSource([path]))


GOOD = picture(1)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"txt": b"t"}, "no image"),
        ({"jpg": b"", "txt": b"t"}, "no image"),
        ({"jpg": GOOD, "png": GOOD, "txt": b"t"}, "unclear images"),
        ({"jpg": GOOD, "jpeg": GOOD, "txt": b"t"}, "unclear images"),
        ({"source.jpg": GOOD, "txt": b"t"}, "unclear images"),
        ({"source1.jpg": GOOD, "target.jpg": GOOD, "json": b'{"instruction": "a"}'}, "unclear images"),
        ({"image0.jpg": GOOD, "image2.jpg": GOOD}, "unclear images"),
        ({"image0.jpg": GOOD, "json": b'{"caption": "a"}'}, "bad splits"),
        ({"image0.jpg": GOOD, "json": b'{"splits": [{"text": "a"}, {"image": "image0"}]}'}, "bad splits"),
        ({"source0.jpg": GOOD, "source1.jpg": GOOD, "target.jpg": GOOD}, "no instruction"),
        ({"jpg": GOOD}, "no caption"),
        ({"jpg": GOOD, "txt": b" \n"}, "no caption"),
        ({"jpg": GOOD, "json": b"{}"}, "no caption"),
        ({"jpg": GOOD, "json": b'{"captions": ["", " "]}'}, "no caption"),
        ({"jpg": GOOD, "txt": b"\xff\xfe"}, "bad text"),
        ({"jpg": GOOD, "txt": b"t", "json": b"{"}, "bad json"),
        ({"jpg": GOOD, "txt": b"t", "json": b"[1]"}, "bad json"),
        ({"jpg": GOOD, "txt": b"t", "json": b"\xff"}, "bad json"),
        ({"jpg": GOOD, "json": b'{"caption": 3}'}, "no caption"),
        ({"jpg": GOOD, "json": b'{"captions": [3]}'}, "no caption"),
        ({"jpg": GOOD, "json": b"[" * 100_000}, "bad json"),
        ({"jpg": GOOD, "cls": b"cat"}, "bad label"),
        ({"source.jpg": GOOD, "target.jpg": GOOD, "json": b"{}"}, "no instruction"),
        ({"source.jpg": GOOD, "target.jpg": GOOD, "json": b'{"instructions": [3]}'}, "no instruction"),
    ],
)
def test_bad_samples_are_rejected_by_kind(tmp_path: Path, parts: dict[str, bytes], kind: str) -> None:
    item = only(tmp_path, parts)
    assert isinstance(item, BadItemError)
    assert item.reason.partition(":")[0] == kind
    assert item.key == "one-k"


def test_a_repeated_part_is_rejected(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.jpg", GOOD), ("a.JPG", GOOD), ("a.txt", b"t")])
    (item,) = everything(WebDatasetSource([path]))
    assert isinstance(item, BadItemError)
    assert item.reason.startswith("repeated part: 'a.JPG'")


def test_captions_come_from_the_fields_that_are_named(tmp_path: Path) -> None:
    tree = {"caption": "alt", "re": " long ", "short": "", "also": 1}
    parts = {"jpg": GOOD, "txt": b"text", "json": json.dumps(tree).encode()}
    assert meta(only(tmp_path, parts))["caption"] == "text"
    assert meta(only(tmp_path, parts, caption_fields=("re",)))["caption"] == "long"
    several = meta(only(tmp_path, parts, caption_fields=("re", "txt", "short")))
    assert several["captions"] == {"re": "long", "txt": "text"}
    assert "caption" not in several  # a reader would take it for the only one
    missing = only(tmp_path, parts, caption_fields=("short", "gone"))
    assert isinstance(missing, BadItemError)
    assert missing.reason.startswith("no caption")


def test_captions_and_instructions_may_be_one_text_or_several(tmp_path: Path) -> None:
    tree = {"caption": ["a", " b ", 3], "recaption": {"long": "l", "short": ""}}
    parts = {"jpg": GOOD, "json": json.dumps(tree).encode()}
    assert meta(only(tmp_path, parts))["captions"] == ["a", "b"]
    assert meta(only(tmp_path, parts, caption_fields=("recaption",)))["captions"] == {"long": "l"}
    edit = {"source.jpg": GOOD, "target.jpg": GOOD, "json": b'{"instructions": " make it red "}'}
    assert meta(only(tmp_path, edit))["instructions"] == ["make it red"]


@pytest.mark.parametrize("name", ["caption", "captions"])
def test_half_an_emoji_does_not_reach_a_tokenizer(tmp_path: Path, name: str) -> None:
    tree = json.dumps({name: "a \ud83d b"}).encode()  # a text cut between the two halves
    assert meta(only(tmp_path, {"jpg": GOOD, "json": tree}))["caption"] == "a ? b"


def test_labels_need_no_caption(tmp_path: Path) -> None:
    assert meta(only(tmp_path, {"jpg": GOOD, "cls": b"7\n"})) == {"label": 7, "source_key": "k"}
    tree = {"label": 3, "class": "n01"}
    assert (
        meta(only(tmp_path, {"jpg": GOOD, "json": json.dumps(tree).encode()})) == {"source_key": "k"} | tree
    )


def test_an_edit_has_instructions_and_no_caption(tmp_path: Path) -> None:
    """A reader takes the first text field it finds: a caption would stand for the instruction."""
    tree = {"caption": "a cat", "instruction": " make it red "}
    item = only(
        tmp_path, {"source.jpg": GOOD, "target.jpeg": GOOD, "txt": b"t", "json": json.dumps(tree).encode()}
    )
    assert meta(item) == {"instructions": ["make it red"], "source_key": "k"}
    assert isinstance(item, Sample)
    assert set(item.parts) == {"source.jpg", "target.jpg", "json"}


def test_nan_in_json_does_not_reach_our_shards(tmp_path: Path) -> None:
    item = only(tmp_path, {"jpg": GOOD, "txt": b"t", "json": b'{"similarity": NaN, "width": 4}'})
    assert meta(item) == {"caption": "t", "source_key": "k", "width": 4}


def test_our_own_pixel_shards_are_a_source(tmp_path: Path) -> None:
    trees = [
        {"captions": ["a", "b"], "scene": {"objects": [1]}},
        {"captions": {"llava": "long", "alt": "short"}},
        {"label": 4, "class": "n02"},
        {"instructions": ["make it red", "red"], "changed": [[0, 0, 4, 4]]},
    ]
    with ShardWriter(tmp_path / "old", max_samples_per_shard=3, source="old") as writer:
        for number, tree in enumerate(trees):
            image = {"png": picture(number, "PNG")}
            if "instructions" in tree:
                image = {"source.png": picture(1, "PNG"), "target.webp": picture(2, "WEBP")}
            writer.write(Sample(f"old-{number}", {**image, "json": json.dumps(tree).encode()}))
    tars = find_tars([tmp_path / "old"])
    assert [path.name for path in tars] == ["shard-000000.tar", "shard-000001.tar"]
    ledger = write_sources({tmp_path / "new": WebDatasetSource(tars)}, strict=True)[tmp_path / "new"]
    assert (ledger.num_read, ledger.num_rejected) == (4, 0)
    old, new = ShardDataset.open(tmp_path / "old"), ShardDataset.open(tmp_path / "new")
    for before, after in zip(old.read(range(4)), new.read(range(4)), strict=True):
        assert set(after.parts) == set(before.parts)
        assert all(after.parts[part] == before.parts[part] for part in before.parts if part != "json")
        assert meta(after) == {**meta(before), "source_key": before.key}


def test_keys_of_all_tars_differ_and_fit_our_shards(tmp_path: Path) -> None:
    names = ["a/00000.tar", "b/00000.tar", "train.tar", "train-1.tar", "odd name.v1.tar", "odd_name_v1.tar"]
    keys = ["1-5", "5", "deep/er/5", "deep_er_5", "ключ", "k" * 80, "k" * 81, "-", "_x"]
    tars = [write_tar(tmp_path / name, [(f"{key}.jpg", GOOD) for key in keys]) for name in names]
    found = [item.key for item in everything(WebDatasetSource(tars))]
    assert len(found) == len(set(found)) == len(names) * len(keys)
    with ShardWriter(tmp_path / "out", max_samples_per_shard=999, source="x") as writer:
        for key in found:
            writer.write(Sample(key, {"jpg": b"x"}))  # refuses a key that does not fit
    again = WebDatasetSource([Path(str(path)) for path in tars])
    assert [item.key for item in everything(again)] == found


def test_no_name_in_a_tar_writes_outside_the_folder(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/evil", "..", "a/../../b"]
    path = write_tar(
        tmp_path / "in" / "t.tar",
        [(f"{name}.{part}", GOOD if part == "jpg" else b"t") for name in names for part in ("jpg", "txt")],
    )
    before = set(tmp_path.parent.rglob("*"))
    ledger = write_sources({tmp_path / "out": WebDatasetSource([path])})[tmp_path / "out"]
    assert ledger.num_read == ledger.num_written + ledger.num_rejected >= 4
    new = set(tmp_path.parent.rglob("*")) - before
    assert all(found.is_relative_to(tmp_path / "out") for found in new)
    assert all("/" not in sample.key for sample in ShardDataset.open(tmp_path / "out").read([0, 1]))


def test_one_damaged_tar_does_not_stop_the_others(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / "in" / f"{number:05d}.tar", img2dataset(number) + img2dataset(number + 50))
        for number in range(4)
    ]
    whole = tars[2].read_bytes()
    tars[2].write_bytes(whole[: 4 * BLOCK])
    with pytest.raises(UserError, match=r"1 of 4 inputs .*00002\.tar"):
        write_sources({tmp_path / "out": WebDatasetSource(tars)})
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    tars[2].write_bytes(whole)
    ledger = write_sources({tmp_path / "other": WebDatasetSource(tars)})[tmp_path / "other"]
    assert (ledger.num_read, ledger.num_written) == (8, 8)


def test_tars_in_linked_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("b/1.tar", "a.deep/0.tar", "a.deep/.hidden.tar", "a.deep/0.txt"):
        write_tar(tmp_path / "elsewhere" / name, img2dataset(1))
    for name in ("b", "a.deep"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert find_tars([tmp_path / "set"]) == [tmp_path / "set/a.deep/0.tar", tmp_path / "set/b/1.tar"]
    (tmp_path / "elsewhere/b/loop").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match=r"set/b/loop: a circle of links"):
        find_tars([tmp_path / "set"])
    (tmp_path / "elsewhere/b/loop").unlink()
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere" / "b")
    with pytest.raises(UserError, match=r"b/1\.tar: given twice, or by two links"):
        find_tars([tmp_path / "set"])


def test_the_description_tells_tars_apart_but_not_where_they_are(tmp_path: Path) -> None:
    for place in ("a/set", "b/set"):
        write_tar(tmp_path / place / "00000.tar", img2dataset(1))
    first, second = (WebDatasetSource(find_tars([tmp_path / place / "set"])) for place in "ab")
    assert first.description == second.description
    named = WebDatasetSource(find_tars([tmp_path / "a"]), caption_fields=("caption",))
    write_tar(tmp_path / "a/set/00000.tar", [file for number in range(9) for file in img2dataset(number)])
    third = WebDatasetSource(find_tars([tmp_path / "a/set"]))
    assert len({first.description, named.description, third.description}) == 3


def test_wrong_inputs_are_refused_in_one_line(tmp_path: Path, tar: Path) -> None:
    with pytest.raises(UserError, match=r"gone: no such file"):
        find_tars([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \*\.tar there"):
        find_tars([tmp_path / "empty"])
    with pytest.raises(UserError, match="given twice"):
        find_tars([tar, tar])
    with pytest.raises(UserError, match=r"gone\.tar: no such file"):
        WebDatasetSource([tmp_path / "gone.tar"])
    with pytest.raises(UserError, match="no tar header"):
        (tmp_path / "page.tar").write_bytes(b"<html>" * 500)
        everything(WebDatasetSource([tmp_path / "page.tar"]))
