"""Whatever people bring: no traceback, every item written or rejected, and nothing changed without a word.

Inputs are made by the rules of each format from a seed: what is good in them, and what it must become, is known to the
generator, by rules of its own.
"""

from __future__ import annotations

import csv
import decimal
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from base.config import UserError
from data.config import PixelConfig
from data.image_set import ImageSet, write_class_folders
from data.samples.images import PixelPacker, decode_image, image_parts
from data.shards import Sample, ShardDataset
from data.sources.base import BadItemError, InUnits, Source
from data.sources.image_folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.omniedit import OmniEditFilter, omniedit_source
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.tar_indexing import index_shards
from data.sources.tar_samples import find_tars
from data.sources.webdataset import WebDatasetSource
from evaluation.image_source import FileImages
from evaluation.metrics.dpg import read_graphs
from evaluation.prompt_sets import write_gedit
from evaluation.reconstruct import image_names
from generator.pipeline import read_pixels
from generator.prompts import read_prompts
from helpers.trees import tar_of

NUM_DEFAULT, NUM_SLOW = 120, 2000
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Rng = np.random.Generator


@dataclass(frozen=True)
class Picture:
    """Bytes of a file, and the upright RGB that they must become; None: they are no picture."""

    payload: bytes = field(repr=False)
    truth: Pixels | None = field(repr=False)
    suffix: str = "png"
    tolerance: float = 1.0  # mean absolute difference


@dataclass(frozen=True)
class Truth:
    """What an item must become; `image` None: it must be rejected."""

    image: Picture | None
    caption: str | None = None
    label: int | None = None


# --- pictures


def picture(rng: Rng, bad_share: float = 0.25) -> Picture:
    good = good_picture(rng)
    if rng.random() >= bad_share:
        return good
    kind = rng.integers(5)
    if kind == 0:
        return Picture(good.payload[: len(good.payload) // 2], None, good.suffix)
    if kind == 1:
        return Picture(b"", None, good.suffix)
    if kind == 2:
        return Picture(rng.bytes(int(rng.integers(1, 200))), None, good.suffix)
    if kind == 3:
        return Picture(good.payload[:8] + rng.bytes(100), None, good.suffix)
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, ["BMP", "GIF", "TIFF", "EPS", "PPM"][rng.integers(5)])
    return Picture(buffer.getvalue(), None, good.suffix)


def good_picture(rng: Rng) -> Picture:
    """Any mode that the three formats hold, under any orientation."""
    height, width = rng.integers(8, 20, 2)
    corners = rng.integers(0, 256, (2, 2, 3)).astype(float)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    rows = corners[0, 0] * (1 - x) + corners[0, 1] * x
    other = corners[1, 0] * (1 - x) + corners[1, 1] * x
    base = np.rint(rows * (1 - y) + other * y).astype(np.uint8)
    alpha = np.where(rng.random((height, width)) < 0.5, 255, rng.integers(0, 256, (height, width)))
    orientation = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8]))  # 0: no note
    mode = str(
        rng.choice(
            ["1", "L", "LA", "P", "P+t", "RGB", "RGBA", "I;16", "I;16+t", "JPEG", "JPEG L", "CMYK", "WEBP"]
        )
    )
    tolerance = {"JPEG": 8.0, "JPEG L": 8.0, "CMYK": 12.0}.get(mode, 1.0)
    image, truth = encoded(mode, stored(base, orientation), stored(alpha.astype(np.uint8), orientation))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    options: dict[str, Any] = {"exif": exif.tobytes()} if orientation else {}
    if mode.startswith("JPEG") or mode == "CMYK":
        image.save(buffer, "JPEG", quality=95, subsampling=0, **options)
    elif mode == "WEBP":
        image.save(buffer, "WEBP", lossless=True, exact=True, **options)
    else:
        image.save(buffer, "PNG", **options)
    suffixes = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
    kind = "JPEG" if mode.startswith("JPEG") or mode == "CMYK" else "WEBP" if mode == "WEBP" else "PNG"
    return Picture(buffer.getvalue(), upright(truth, orientation), suffixes[kind], tolerance)


def stored(truth: Pixels, orientation: int) -> Pixels:
    """The pixels of a file whose note says `orientation` and which shows `truth` (EXIF 2.32, tag 0x0112)."""
    return {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }.get(orientation, lambda a: a)(truth)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """The reverse."""
    return stored(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def encoded(mode: str, base: Pixels, alpha: Pixels) -> tuple[Image.Image, Pixels]:
    """An image of this mode, and what it shows on white."""
    grey = base[..., 0].copy()
    base, alpha = np.ascontiguousarray(base), np.ascontiguousarray(alpha)

    def on_white(pixels: Pixels, opacity: Pixels) -> Pixels:
        share = opacity[..., None] / 255
        return np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)

    def three(one: Pixels) -> Pixels:
        return np.repeat(one[..., None], 3, axis=2)

    if mode == "1":
        return Image.fromarray(grey > 127), three(np.where(grey > 127, 255, 0).astype(np.uint8))
    if mode in ("L", "JPEG L"):
        return Image.fromarray(grey), three(grey)
    if mode == "LA":
        return Image.fromarray(np.stack([grey, alpha], axis=2)), on_white(three(grey), alpha)
    if mode == "RGBA":
        return Image.fromarray(np.dstack([base, alpha])), on_white(base, alpha)
    if mode.startswith("P"):
        index = (base[..., 0] >> 7) * 4 + (base[..., 1] >> 7) * 2 + (base[..., 2] >> 7)
        palette = np.array([[r, g, b] for r in (10, 240) for g in (20, 230) for b in (30, 220)], np.uint8)
        image = Image.fromarray(index)
        image.putpalette(palette.tobytes())
        shown = palette[index]
        if mode == "P+t":
            image.info["transparency"] = int(index[0, 0])
            shown = np.where((index == index[0, 0])[..., None], 255, shown).astype(np.uint8)
        return image, shown
    if mode.startswith("I;16"):
        deep = grey.astype(np.uint16) * 257 - np.minimum(grey, 100)
        image = Image.fromarray(deep)
        shown = three(np.rint(deep / 257).astype(np.uint8))
        if mode == "I;16+t":
            image = with_transparent_grey(image, int(deep[0, 0]))
            shown = np.where((deep == deep[0, 0])[..., None], 255, shown).astype(np.uint8)
        return image, shown
    image = Image.fromarray(base)
    return (image.convert("CMYK") if mode == "CMYK" else image), base


def with_transparent_grey(image: Image.Image, value: int) -> Image.Image:
    image.info["transparency"] = value
    return image


# --- texts


def text(rng: Rng) -> tuple[bytes, str | None]:
    """Bytes of a caption file, and the caption; None: there is none."""
    words = str(
        rng.choice(
            [
                "a red box",
                "ein Bär",
                "猫と犬",
                "\U0001f469\u200d\U0001f692 at work",
                'a "quoted" \\ text',
                "x",
            ]
        )
    )
    return [
        lambda: (words.encode(), words),
        lambda: (f" \t{words}\n\n".encode(), words),
        lambda: (b"\xef\xbb\xbf" + words.encode(), words),
        lambda: (f"{words}\r\nsecond".encode(), f"{words}\r\nsecond"),
        lambda: (f"\u00a0{words}\u2003".encode(), words),
        lambda: (b"\xef\xbb\xbf", None),
        lambda: ("\u00a0\u200b".encode(), None),
        lambda: ("\u2060\u200d\u200e\ufe0f\u00ad".encode(), None),
        lambda: (b" \n", None),
        lambda: (b"", None),
        lambda: (b"caf\xe9", None),
        lambda: (b"a\0b", None),
        lambda: (words.encode("utf-16"), None),
        lambda: (words.encode("utf-16-le")[:1] + b"\xff\xfe\x80", None),
    ][rng.integers(14)]()


def number(rng: Rng) -> tuple[Any, int | None]:
    """A value of a table, and the number from 0 that it means."""
    value = int(rng.integers(0, 12))
    return [
        (value, value),
        (float(value), value),
        (str(value), value),
        (f" {value}.0 ", value),
        (decimal.Decimal(value), value),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (value + 0.5, None),
        (-1, None),
        ("N/A", None),
        ("", None),
        ("1e999", None),
        ("１２٣x", None),
    ][rng.integers(14)]


def name(rng: Rng, number: int) -> str:
    """A file's name without suffix; the number keeps names apart and in order."""
    odd = ["", " ", "é", "a.b", "'", "\n", "-", "#", "%41", "\udcff", "漢" * 20, "$(x)", "\\", "_" * 100]
    return f"f{number:02d}{odd[rng.integers(len(odd))]}"


# --- inputs: each makes one, reads it, and returns what was read beside what must be


Outcome = tuple[Sequence[Sample | BadItemError], Sequence[Truth]]


def captioned_folder(rng: Rng, root: Path) -> Outcome:
    truths = []
    for position in range(rng.integers(1, 5)):
        one, stem = picture(rng), name(rng, position)
        suffix = str(rng.choice(["png", "JPG", "jpeg", "webp"]))
        (root / f"{stem}.{suffix}").write_bytes(one.payload)
        payload, caption = text(rng)
        kind = rng.integers(4)
        if kind == 0:
            caption = None
        elif kind == 1 and caption is not None:
            (root / f"{stem}.json").write_text(
                json.dumps({"caption": caption, "score": float("nan"), "n": None})
            )
        else:
            (root / f"{stem}.txt").write_bytes(payload)
        truths.append(Truth(one if caption else None, caption))
    for other in ("scan.bmp", "notes.md", "lonely.txt"):
        if rng.random() < 0.3:
            (root / other).write_bytes(b"x")
            truths.append(Truth(None))
    for hidden in (".DS_Store", "._f00.png", ".ipynb_checkpoints/f00-checkpoint.png", "__MACOSX/f00.png"):
        if rng.random() < 0.3:
            (root / hidden).parent.mkdir(exist_ok=True)
            (root / hidden).write_bytes(good_picture(rng).payload)
    if rng.random() < 0.2:
        os.mkfifo(root / "pipe.png")
        truths.append(Truth(None))
    return everything(InUnits(FolderSource(root), 3)), truths


def class_folder(rng: Rng, root: Path) -> Outcome:
    truths, must_refuse = [], False
    for label in range(rng.integers(1, 4)):
        folder = root / name(rng, label)
        if rng.random() < 0.3:  # a link to a folder elsewhere
            (root.parent / f"elsewhere{label}").mkdir()
            folder.symlink_to(root.parent / f"elsewhere{label}")
        folder.mkdir(exist_ok=True)
        count = rng.integers(0, 3) if rng.random() < 0.15 else rng.integers(1, 3)
        must_refuse |= count == 0
        for position in range(count):
            one = picture(rng)
            (folder / f"{name(rng, position)}.png").write_bytes(one.payload)
            truths.append(Truth(one, None, label))
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (root / hidden).mkdir()
        (root / hidden / "a.png").write_bytes(good_picture(rng).payload)
    if rng.random() < 0.1:
        (root / "f00_round").symlink_to(root)
        must_refuse = True
    if must_refuse:
        for read in (
            lambda: FolderSource(root, labels=True),
            lambda: write_class_folders(root, root.parent / "m", ["png"]),
        ):
            with pytest.raises(UserError, match=r"circle of links|without an image|lists no image"):
                read()
        return [], []
    write_class_folders(root, root.parent / "m", ["png"])
    items = ImageSet.open(root.parent / "m").items
    assert [item.meta["label"] for item in items] == [truth.label for truth in truths]
    assert len(image_names(root)) == len(FileImages.of_folder(root)) == len(truths)
    return everything(InUnits(FolderSource(root, labels=True), 2)), truths


def listed_folder(rng: Rng, root: Path) -> Outcome:
    lines, truths = [], []
    for position in range(rng.integers(1, 5)):
        one, stem = picture(rng), f"{name(rng, position)}.png"
        (root / stem).write_bytes(one.payload)
        payload, caption = text(rng)
        line = json.dumps({"file": stem, "caption": payload.decode("utf-8", "replace")}).encode()
        if caption is None and rng.random() < 0.3:
            line = b'{"file": "caf\xe9"}'
        elif payload and caption is None and b"\xff" in payload + b"\xff":
            line = json.dumps({"file": stem, "caption": [None, 3, "", "\ufeff"][rng.integers(4)]}).encode()
        lines.append(line)
        truths.append(Truth(one if caption else None, caption))
    mark = b"\xef\xbb\xbf" if rng.random() < 0.5 else b""
    (root.parent / "list.jsonl").write_bytes(mark + [b"\n", b"\r\n"][rng.integers(2)].join(lines))
    return everything(InUnits(FolderSource(root, root.parent / "list.jsonl"), 3)), truths


def parquet(rng: Rng, root: Path) -> Outcome:
    is_class, is_struct = rng.random() < 0.5, rng.random() < 0.5
    images, captions, labels, truths = [], [], [], []
    typed = [number(rng) for _ in range(100)]
    kind = type(typed[0][0])
    typed = [(value, meant) for value, meant in typed if type(value) in (kind, type(None))]
    for position in range(rng.integers(1, 6)):
        one = picture(rng)
        payload, caption = text(rng)
        value, label = typed[position % len(typed)]
        if caption is None:
            captions.append([None, "", "\ufeff", " \u200b"][rng.integers(4)])
        else:
            captions.append(payload.decode())
        images.append({"bytes": one.payload, "path": None} if is_struct else one.payload)
        labels.append(value)
        wanted = label is not None if is_class else caption is not None
        truths.append(
            Truth(one if wanted else None, None if is_class else caption, label if is_class else None)
        )
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if is_struct else pa.binary()
    table = pa.table(
        {
            "image": pa.array(images, struct),
            "text": pa.array(captions, pa.string()),
            "label": pa.array(labels),
        }
    )
    pq.write_table(table, root / "a.parquet", row_group_size=2)
    if rng.random() < 0.1:
        (root / ".b.parquet").write_bytes(b"hidden")
    columns = ParquetColumns(image="image", **({"label": "label"} if is_class else {"captions": ("text",)}))
    return everything(ParquetSource([str(root)], columns, 3)), truths


def omniedit(rng: Rng, root: Path) -> Outcome:
    typed = [number(rng) for _ in range(100)]
    kind = type(typed[0][0])
    typed = [(value, meant) for value, meant in typed if type(value) in (kind, type(None))]
    rows, truths = [], []
    for position in range(rng.integers(1, 5)):
        one = picture(rng)
        value, meant = typed[position % len(typed)]
        is_half = isinstance(value, float) and value == value and value not in (float("inf"), -1.0)
        score = float(value) if is_half else meant
        wanted = score is not None and score >= 6
        texts: Any = [["add a hat"], ["", "\ufeff"], None][rng.choice([0, 0, 0, 1, 2])]
        image = {"bytes": one.payload, "path": None}
        rows.append(
            {
                "omni_edit_id": "x",
                "task": "swap",
                "src_img": image,
                "edited_img": image,
                "edited_prompt_list": texts,
            }
            | {"sc_score_1": None, "sc_score_2": 3, "pq_score": 1.0, "o_score": value}
        )
        truths.append(Truth(one if wanted and texts == ["add a hat"] else None, "add a hat"))
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array([row[column] for row in rows]) for column in rows[0]}
    for column in ("src_img", "edited_img"):
        columns[column] = pa.array([row[column] for row in rows], struct)
    columns["edited_prompt_list"] = pa.array(
        [row["edited_prompt_list"] for row in rows], pa.list_(pa.string())
    )
    pq.write_table(pa.table(columns), root / "a.parquet")
    return everything(omniedit_source([str(root)], 2, OmniEditFilter({"o_score": 6}))), truths


def write_tar(files: Sequence[tuple[str, bytes]], path: Path, format: int = tarfile.PAX_FORMAT) -> Path:
    path.write_bytes(tar_of(files, format))
    return path


def webdataset(rng: Rng, root: Path) -> Outcome:
    files: list[tuple[str, bytes]] = []
    truths, num_strays = [], 0
    for position in range(rng.integers(1, 5)):
        one, key = picture(rng), f"{position:03d}{['', ' é', '_x', '漢'][rng.integers(4)]}"
        payload, caption = text(rng)
        value, label = number(rng)
        parts = [(f"{key}.{one.suffix}", one.payload)]
        kind = rng.integers(5)
        if kind == 0:
            parts.append((f"{key}.txt", payload))
            truth = Truth(one if caption else None, caption)
        elif kind == 1:
            parts.append((f"{key}.json", json.dumps({"caption": caption}).encode()))
            truth = Truth(one if caption else None, caption)
        elif kind == 2:
            parts.append((f"{key}.cls", str(value).encode()))
            truth = Truth(one if label is not None else None, None, label)
        elif kind == 3:
            parts.append((f"{key}.json", json.dumps({"label": value}, default=str).encode()))
            truth = Truth(one if label is not None else None, None, label)
        else:
            parts += [(f"{key}.txt", b"x"), (f"{key}.{one.suffix}", one.payload)]  # a part twice
            truth = Truth(None)
        files += parts
        truths.append(truth)
        if rng.random() < 0.2:
            files.append((f"stray_{position}", b"x"))
            num_strays += 1
    path = write_tar(files, root / "a.tar", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][rng.integers(2)])
    (root / "._a.tar").write_bytes(b"mac")
    source = WebDatasetSource(find_tars([root]))
    if rng.random() < 0.15:
        num_bytes = sum(512 + -(-len(payload) // 512) * 512 for _, payload in files)  # without PAX headers
        path.write_bytes(path.read_bytes()[: rng.integers(num_bytes)])
        with pytest.raises(UserError, match=r"cut short|damaged"):
            everything(source)
        return [], []
    found = everything(source)
    strays = [item for item in found if isinstance(item, BadItemError) and "stray_" in item.key]
    assert len(strays) == num_strays  # told before the sample that they follow
    return [item for item in found if item not in strays], truths


def indexed(rng: Rng, root: Path) -> Outcome:
    """Tars of others in place: the same samples, pictures upright."""
    pictures = [good_picture(rng) for _ in range(rng.integers(1, 4))]
    files = [(f"k{i}.{one.suffix}", one.payload) for i, one in enumerate(pictures)]
    write_tar(files, root / "a.tar", tarfile.USTAR_FORMAT)
    index_shards(root)
    samples = ShardDataset.open(root).read(range(len(pictures)))
    batch = PixelPacker(PixelConfig(len(pictures), 8)).collate(
        samples, step=0, stream=0, epochs=[0] * len(samples), seed=0
    )
    assert batch.pixels.shape == (len(pictures), 3, 8, 8)
    return samples, [Truth(one) for one in pictures]


def imagenet(rng: Rng, root: Path) -> Outcome:
    truths = []
    for label, synset in enumerate(("n00000001", "n00000002")):
        pictures = [picture(rng) for _ in range(rng.integers(1, 3))]
        files = [(f"{synset}_{i}.JPEG", one.payload) for i, one in enumerate(pictures)]
        if rng.random() < 0.3:
            files.insert(0, (f"._{synset}_0.JPEG", b"mac"))
        write_tar(files, root / f"{synset}.tar", tarfile.GNU_FORMAT)
        truths += [Truth(one, None, label) for one in pictures]
    return everything(InUnits(ImageNetSource(root, num_classes=2), 2)), truths


def prompts(rng: Rng, root: Path) -> Outcome:
    given = [text(rng) for _ in range(3)]
    good = [(payload, caption) for payload, caption in given if caption and "\n" not in caption]
    mark, end = (b"\xef\xbb\xbf" if rng.random() < 0.5 else b""), [b"\n", b"\r\n"][rng.integers(2)]
    lines = [payload.strip().removeprefix(b"\xef\xbb\xbf") for payload, _ in good]
    (root / "p.txt").write_bytes(mark + end.join([*lines, "\u200b".encode(), b""]))
    rows = [json.dumps({"prompt": caption}, ensure_ascii=False).encode() for _, caption in good]
    (root / "p.jsonl").write_bytes(mark + end.join([*rows, b""]))
    graph = io.StringIO()
    writer = csv.writer(graph)
    writer.writerow(["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"])
    writer.writerows(
        [str(i), caption, 1, 0, "entity - whole (x)", "Is there?"] for i, (_, caption) in enumerate(good)
    )
    (root / "g.csv").write_bytes(mark + graph.getvalue().encode())
    wanted = [caption for _, caption in good]
    for read in (
        lambda: [prompt.text for prompt in read_prompts(root / "p.txt")],
        lambda: [prompt.text for prompt in read_prompts(root / "p.jsonl")],
        lambda: [found.prompt for found in read_graphs(root / "g.csv").values()],
    ):
        if wanted:
            assert read() == wanted
        else:
            with pytest.raises(UserError):
                read()
    for payload, caption in given:
        (root / "raw.txt").write_bytes(payload)
        try:
            assert [prompt.text for prompt in read_prompts(root / "raw.txt")] == (caption or "").splitlines()
        except UserError:
            assert caption is None
    return [], []


def benchmark_images(rng: Rng, root: Path) -> Outcome:
    """A manifest's images, GEdit's, and those that are edited: one picture, read alike everywhere."""
    one = picture(rng)
    (root / "a.bin").write_bytes(one.payload)
    row = {"key": "a", "images": {"result": "a.bin"}, "meta": {"caption": "x\u2028y"}}
    (root / "manifest.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n"
    )
    table = {"key": ["a"], "task_type": ["t"], "instruction": ["i"], "instruction_language": ["en"]}
    pq.write_table(
        pa.table({**table, "input_image": [{"bytes": one.payload, "path": None}]}), root / "g.parquet"
    )
    readers: list[Callable[[], Pixels]] = [
        lambda: opened.read(opened.items[0], "result").permute(1, 2, 0).numpy(),
        lambda: FileImages([root / "a.bin"]).read(0, 1)[0].permute(1, 2, 0).numpy(),
        lambda: (
            np.asarray(Image.open(root / "images/a.png")) if write_gedit([root / "g.parquet"], root) else None
        ),
    ]
    opened = ImageSet.open(root)
    for read in readers:
        if one.truth is None:
            with pytest.raises(UserError):
                read()
        else:
            assert_shows(read(), one)
    try:
        assert read_pixels(root / "a.bin", 8).shape == (3, 8, 8) and one.truth is not None
    except UserError:
        assert one.truth is None
    return [], []


INPUTS = (
    captioned_folder,
    class_folder,
    listed_folder,
    parquet,
    omniedit,
    webdataset,
    indexed,
    imagenet,
    prompts,
    benchmark_images,
)


# --- what must hold


def everything(source: Source) -> list[Sample | BadItemError]:
    """What becomes of every item, as write_sources does it."""
    prepare = Preparation(encoding="png")  # so that turned pictures lose nothing
    found: list[Sample | BadItemError] = []
    for unit in range(len(source.units)):
        for item in source.items(unit):
            try:
                found.append(item if isinstance(item, BadItemError) else prepare(item))
            except BadItemError as error:
                found.append(error)
    return found


def assert_shows(pixels: Pixels, one: Picture) -> None:
    assert one.truth is not None
    assert pixels.shape == one.truth.shape
    assert np.abs(pixels.astype(float) - one.truth).mean() <= one.tolerance


def check(found: Sequence[Sample | BadItemError], truths: Sequence[Truth]) -> None:
    assert len(found) == len(truths)
    for item, truth in zip(found, truths, strict=True):
        if truth.image is None or truth.image.truth is None:
            assert isinstance(item, BadItemError), (item, truth)
            assert ": " in item.reason and item.key
            continue
        assert isinstance(item, Sample), (item, truth)
        for part in image_parts(item.parts):
            assert_shows(np.asarray(decode_image(item, part)), truth.image)
        tree = json.loads(item.parts.get("json", b"{}"))
        assert tree.get("caption", (tree.get("instructions") or [None])[0]) == truth.caption
        assert tree.get("label") == truth.label


def run(seeds: range, folder: Path) -> None:
    for seed in seeds:
        make = INPUTS[seed % len(INPUTS)]
        root = folder / f"{seed:05d}" / "set"
        root.mkdir(parents=True)
        try:
            check(*make(np.random.default_rng(seed), root))
        except (Exception, pytest.fail.Exception) as error:
            raise AssertionError(f"seed {seed}, {make.__name__}: {error!r}") from error


def test_hostile_inputs_are_read_or_rejected_and_never_changed(tmp_path: Path) -> None:
    run(range(NUM_DEFAULT), tmp_path)


@pytest.mark.slow
def test_two_thousand_hostile_inputs_are_read_or_rejected_and_never_changed(tmp_path: Path) -> None:
    run(range(NUM_DEFAULT, NUM_DEFAULT + NUM_SLOW), tmp_path)
