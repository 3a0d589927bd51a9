"""One rule for all who read what people bring: pictures, folders, repeated keys, labels."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from base.config import UserError
from data.config import PixelConfig
from data.image_set import ImageSet, Item, write_manifest
from data.samples.captions import read_label
from data.samples.images import PixelPacker, decode_image, fit_square, to_rgb
from data.shards import Sample, ShardDataset
from data.sources.base import InUnits
from data.sources.image_folder import FolderSource
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.tar_file import TarReader
from data.sources.tar_indexing import index_shards
from data.sources.write import write_sources
from evaluation.image_source import FileImages
from evaluation.prompt_sets import write_gedit
from generator.pipeline import read_pixels
from launch import make_shards

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]
MODES += ["I;16", "I;16B", "I;16L", "I;16N"]
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sideways(pixels: np.ndarray) -> bytes:
    """A photograph held to the left: its note says, turn me a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(np.rot90(pixels).copy()), exif=exif.tobytes())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_rgb_on_white(mode: str) -> None:
    """Black left, white in the middle, and where the mode has transparency nothing on the right, over black."""
    grey = np.array([[0, 255, 0]], np.uint8)
    opacity = np.array([[255, 255, 0]], np.uint8)
    if mode in ("I", "F") or mode.startswith("I;16"):
        depth = {"I": "<i4", "F": "<f4", "I;16B": ">u2"}.get(mode, "<u2")
        raw = (grey.astype(float) * (1 if mode == "F" else 257)).astype(depth)
        image = Image.frombytes(mode, (3, 1), raw.tobytes())
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        rgba = Image.fromarray(np.dstack([grey, grey, grey, opacity]))
        image = (rgba.convert("LA") if mode == "La" else rgba).convert(mode if mode != "PA" else "LA")
        if mode == "PA":
            image = Image.frombytes("PA", (3, 1), image.tobytes())
            image.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    else:
        image = Image.fromarray(np.dstack([grey] * 3)).convert(mode)
    last = 255 if image.has_transparency_data else 0
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - [[[0] * 3, [255] * 3, [last] * 3]]).max() <= 2


@pytest.mark.parametrize("depth, value", [(2, 1), (4, 3), (8, 77), (16, 40_000)])
def test_the_transparent_grey_of_a_png_counts_in_its_own_depth(depth: int, value: int) -> None:
    """Optimisers write grey of 2 and 4 bits; Pillow widens the pixels, but not the transparent value."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    other = value - 1
    bits = f"{value:0{depth}b}{other:0{depth}b}".ljust(8 * (2 * depth // 8 or 1), "0")
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    payload = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", value))
    payload += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    shown = np.asarray(decode_image(Sample("a", {"png": payload}), "png"))[0, :, 0]
    assert shown.tolist() == [255, round(other * 255 / (2**depth - 1))]


def test_photographs_in_tars_of_others_train_upright(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        payload = sideways(PIXELS)
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    index_shards(tmp_path)
    samples = ShardDataset.open(tmp_path).read([0])
    assert (np.asarray(decode_image(samples[0], "png")) == PIXELS).all()
    batch = PixelPacker(PixelConfig(1, 6)).collate(samples, step=0, stream=0, epochs=[0], seed=0)
    assert torch.equal(batch.pixels[0], torch.from_numpy(PIXELS[:, 1:7]).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["sideways", "grey of 16 bits", "transparent"])
def test_a_picture_is_read_alike_by_every_reader(tmp_path: Path, kind: str) -> None:
    if kind == "sideways":
        payload, truth = sideways(PIXELS), PIXELS
    elif kind == "transparent":
        opacity = np.where(PIXELS[..., :1] > 100, 255, 0).astype(np.uint8)
        payload = encoded(Image.fromarray(np.dstack([PIXELS, opacity])))
        truth = np.where(opacity > 0, PIXELS, 255).astype(np.uint8)
    else:
        payload = encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257))
        truth = np.repeat(PIXELS[..., :1], 3, axis=2)
    (tmp_path / "a.png").write_bytes(payload)
    write_manifest(tmp_path, [Item("a", {"result": "a.png"}, {})])
    images = ImageSet.open(tmp_path)
    row = {"key": ["a"], "task_type": ["t"], "instruction": ["i"], "instruction_language": ["en"]}
    pq.write_table(
        pa.table({**row, "input_image": [{"bytes": payload, "path": None}]}), tmp_path / "g.parquet"
    )
    write_gedit([tmp_path / "g.parquet"], tmp_path / "gedit")
    wanted = torch.from_numpy(truth).permute(2, 0, 1)
    assert torch.equal(images.read(images.items[0], "result"), wanted)
    assert torch.equal(FileImages([tmp_path / "a.png"]).read(0, 1)[0], wanted)
    assert torch.equal(FileImages.of_folder(tmp_path / "gedit").read(0, 1)[0], wanted)
    assert torch.equal(read_pixels(tmp_path / "a.png", 6), wanted[:, :, 1:7])
    assert torch.equal(read_pixels(Image.open(tmp_path / "a.png"), 6), wanted[:, :, 1:7])


@pytest.mark.parametrize("key", ["../out", "a/b", "", ".hidden"])
def test_keys_of_a_benchmark_lead_nowhere_else(tmp_path: Path, key: str) -> None:
    row = {"key": [key], "task_type": ["t"], "instruction": ["i"], "instruction_language": ["en"]}
    image = {"bytes": encoded(Image.fromarray(PIXELS)), "path": None}
    pq.write_table(pa.table({**row, "input_image": [image]}), tmp_path / "g.parquet")
    with pytest.raises(UserError, match=r"g\.parquet: key .* names a file"):
        write_gedit([tmp_path / "g.parquet"], tmp_path / "gedit")


def test_a_benchmark_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    """The second image would take the first one's place."""
    row = {"key": ["cat"], "task_type": ["t"], "instruction": ["i"], "instruction_language": ["en"]}
    image = {"bytes": encoded(Image.fromarray(PIXELS)), "path": None}
    pq.write_table(pa.table({**row, "input_image": [image]}), tmp_path / "g.parquet")
    with pytest.raises(UserError, match=r"g\.parquet: key 'cat' stands there twice"):
        write_gedit([tmp_path / "g.parquet"] * 2, tmp_path / "gedit")


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    for name in ("a.tar", "a.png", "a.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="a pipe or device, not a file"):
        TarReader(tmp_path / "a.tar")
    with pytest.raises(UserError, match="holds no image"):
        FileImages.of_folder(tmp_path)
    with pytest.raises(UserError, match="a pipe or device, not a file"):
        FileImages([tmp_path / "a.png"]).read(0, 1)
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(PIXELS)))
    (tmp_path / "l.jsonl").write_text('{"file": "a.png", "caption": "x"}\n')
    with pytest.raises(UserError, match=r"unreadable image: a\.png: a pipe or device"):
        FolderSource(tmp_path, tmp_path / "l.jsonl").sample(0)


def test_files_that_no_reader_takes_are_in_the_ledger_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, kind in (("a.png", "PNG"), ("b.bmp", "BMP"), ("c.gif", "GIF"), ("d.tiff", "TIFF")):
        (images / name).write_bytes(encoded(Image.fromarray(PIXELS), kind))
    (images / "a.txt").write_text("a caption")
    (images / "e.txt").write_text("a caption without an image")
    ledger = write_sources({tmp_path / "out": InUnits(FolderSource(images), 3)})[tmp_path / "out"]
    assert str(ledger) == "read 5 = written 1 + rejected 4 (other file 4)"
    rejected = (tmp_path / "out/rejected.jsonl").read_text()
    assert all(f"other file: {name}" in rejected for name in ("b.bmp", "c.gif", "d.tiff", "e.txt"))
    assert len(FileImages.of_folder(images)) == 1
    assert "images: 4 other files are not read: b.bmp, c.gif, d.tiff, ..." in capsys.readouterr().err


def test_shards_may_lie_below_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again, the command finds its own shards there: they are no part of the source."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").write_bytes(encoded(Image.fromarray(PIXELS)))
    command = f"make_shards folder --images {tmp_path} --labels --out {tmp_path}/shards --processes 1"
    monkeypatch.setattr("sys.argv", command.split())
    make_shards.main()
    before = (tmp_path / "shards/manifest.json").read_bytes()
    make_shards.main()
    assert (tmp_path / "shards/manifest.json").read_bytes() == before


def test_what_a_square_crop_takes_away_is_counted_and_padding_takes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, width in enumerate((20, 24, 30, 60)):  # losing 0, 17, 33 and 67 %
        pixels = np.full((20, width, 3), (200, 0, 0), np.uint8)
        (images / f"{number}.png").write_bytes(encoded(Image.fromarray(pixels)))
        (images / f"{number}.txt").write_text("red")
    command = f"make_shards folder --images {images} --resolution 16 --encoding png --processes 1"
    for _ in range(2):  # counted again from finished shards
        monkeypatch.setattr("sys.argv", [*command.split(), "--out", str(tmp_path / "crop")])
        make_shards.main()
        assert "2 of 4 images lost more than 20 % of their area" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command.split(), "--out", str(tmp_path / "pad"), "--fit", "pad"])
    make_shards.main()
    assert "lost" not in capsys.readouterr().out
    long = np.asarray(decode_image(ShardDataset.open(tmp_path / "pad").read([3])[0], "png"))
    assert long.shape == (16, 16, 3) and (long[:5] == 255).all() and (long[-6:] == 255).all()
    assert (long[7, :, 0] > 190).all() and (long[7, :, 1] < 10).all()


def test_padding_enlarges_no_image() -> None:
    red = encoded(Image.new("RGB", (40, 10), "red"))
    sample = Sample("a", {"png": red, "json": b'{"caption": "x"}'})
    assert Preparation(resolution=32, fit="pad", encoding="png")(sample).parts["png"]
    with pytest.raises(UserError, match="the longer side must have 48"):
        Preparation(resolution=48, fit="pad")(sample)
    with pytest.raises(UserError, match="the shorter side must have 12"):
        Preparation(resolution=32, fit="pad", min_px=12)(sample)
    assert fit_square(Image.new("RGB", (1, 9000)), 16, pad=True).size == (16, 16)
    with pytest.raises(UserError, match="fit 'stretch'"):
        Preparation(fit="stretch")  # type: ignore[arg-type]


def test_a_repeated_key_is_named_with_its_file(tmp_path: Path) -> None:
    image = encoded(Image.fromarray(PIXELS))

    def source(*keys: str) -> ParquetSource:
        table = pa.table({"image": [image] * len(keys), "text": ["x"] * len(keys), "id": keys})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        columns = ParquetColumns(image="image", captions=("text",), key="id")
        return ParquetSource([str(tmp_path / "a.parquet")], columns, 2)

    with pytest.raises(UserError, match=r"a\.parquet, row groups 0 to 0: key 'cat': used twice"):
        write_sources({tmp_path / "one": source("cat", "cat")})
    with pytest.raises(UserError, match=r"is 'cat' in shard-000000\.tar and shard-000001\.tar"):
        write_sources({tmp_path / "two": source("dog", "cat", "cat", "bird")})


def test_a_label_column_of_another_type_says_so(tmp_path: Path) -> None:
    image = encoded(Image.fromarray(PIXELS))
    columns = ParquetColumns(image="image", label="label")
    for values, kind in (([True], "bool"), ([[1]], "list"), ([{"a": 1}], "struct")):
        pq.write_table(pa.table({"image": [image], "label": values}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"label column 'label' holds {kind}.*, not class numbers"):
            ParquetSource([str(tmp_path / "a.parquet")], columns, 2)
    pq.write_table(
        pa.table({"image": [image] * 4, "label": ["3", "cat", None, "2.0"]}), tmp_path / "a.parquet"
    )
    source = ParquetSource([str(tmp_path / "a.parquet")], columns, 9)
    found = [
        json.loads(i.parts["json"])["label"] if isinstance(i, Sample) else i.reason for i in source.items(0)
    ]
    assert found == [3, "no label: column 'label' holds 'cat', no number", "no label: None", 2]


def test_too_few_classes_name_the_folder_that_was_met() -> None:
    sample = Sample("a", {"json": json.dumps({"label": 7, "class": "zebra"}).encode()})
    assert read_label(sample, 8) == 7
    with pytest.raises(UserError, match=r"label 7 \(class folder 'zebra'\), but num_classes is 7"):
        read_label(sample, 7)
