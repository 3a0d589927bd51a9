"""One picture of what the quickstart has learned: python -m quickstart.readme_picture [--root DIR] [--out FILE.png]

The first images of the sets that the quickstart's last step has judged; none is chosen by hand.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageDraw, ImageFont

from base import files
from base.config import UserError
from base.terminal import say
from launch.runs import entry

if TYPE_CHECKING:
    from data.image_set import ImageSet, Item

SIGN = "RPiAE quickstart/readme_picture.py"
"""EXIF's Software in the picture; the command may replace a file with it."""
IMAGES = Path("evaluation/images")
"""Folder of the image sets `reconstruction`, `t2i` and `edit` below the quickstart's root (chain_scores.py)."""
COLUMNS, TILE_PX, GAP_PX, LINE_PX = 6, 128, 8, 15
TITLE_PT, TEXT_PT = 16, 12
LETTERS_PER_TILE = 20
"""Letters in a line of a caption: as many fit into TILE_PX at TEXT_PT."""
GROUND, INK = "white", "black"

Tile = tuple[Path, str]
"""An image file, and the text below it."""


def main() -> None:
    """Reads the three image sets and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("runs/quickstart"), help="of a finished quickstart")
    parser.add_argument("--out", type=Path, default=Path("docs/images/quickstart.png"), help="PNG file")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".png":
        raise UserError(f"--out {arguments.out}: give a .png file")
    files.check_signed(arguments.out, SIGN)
    entry.use_torch()
    picture = draw(arguments.root)
    signed, payload = Image.Exif(), io.BytesIO()
    signed[ExifTags.Base.Software] = SIGN
    picture.save(payload, "PNG", optimize=True, exif=signed)
    files.write_bytes(arguments.out, payload.getvalue())
    say(f"{arguments.out}: {picture.width} x {picture.height} px, {len(payload.getvalue()):,} bytes")


def draw(root: Path) -> Image.Image:
    """The picture in three sections: originals above reconstructions, drawings with captions, sources beside edits.

    Raises UserError: an image set that the quickstart has not made yet, a file that cannot be read.
    """
    reconstruction, t2i, edit = (_open(root, name) for name in ("reconstruction", "t2i", "edit"))
    rows: list[str | Sequence[Tile]] = [
        "Reconstruction: held-out images, and below each what the decoder makes of it"
    ]
    for role in ("original", "result"):
        rows.append([(reconstruction.path(item, role), "") for item in reconstruction.items[:COLUMNS]])
    rows.append("Text to image: captions that training never saw")
    drawn = t2i.items[:COLUMNS]
    rows.append([(t2i.path(item, "result"), str(item.field("caption"))) for item in drawn])
    rows.append("Editing: each source, and beside it the edit by the instruction")
    pairs = [_edit(edit, item) for item in _by_kind(edit.items)[:COLUMNS]]
    for start in range(0, len(pairs), COLUMNS // 2):
        rows.append([tile for pair in pairs[start : start + COLUMNS // 2] for tile in pair])
    return _paint(rows)


def _open(root: Path, name: str) -> ImageSet:
    from data.image_set import MANIFEST_NAME, ImageSet

    folder = root / IMAGES / name
    if not (folder / MANIFEST_NAME).is_file():
        raise UserError(f"{folder}: no images there yet; finish the quickstart first (make quickstart)")
    return ImageSet.open(folder)


def _by_kind(items: Sequence[Item]) -> list[Item]:
    """The first item of every kind of edit, then the second of every kind, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for item in items:
        kind = str(item.field("kind"))
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


def _edit(edits: ImageSet, item: Item) -> list[Tile]:
    return [(edits.path(item, "source"), ""), (edits.path(item, "result"), str(item.field("instruction")))]


def _paint(rows: Sequence[str | Sequence[Tile]]) -> Image.Image:
    """Paints titles and rows of tiles, one below the other."""
    from data.samples.images import read_rgb_file

    width = COLUMNS * (TILE_PX + GAP_PX) + GAP_PX
    heights = [_height(row) for row in rows]
    picture = Image.new("RGB", (width, sum(heights) + GAP_PX), GROUND)
    pen, y = ImageDraw.Draw(picture), GAP_PX
    for row, height in zip(rows, heights, strict=True):
        if isinstance(row, str):
            pen.text((GAP_PX, y + GAP_PX), row, INK, ImageFont.load_default(TITLE_PT))
        else:
            for column, (path, text) in enumerate(row):
                x = GAP_PX + column * (TILE_PX + GAP_PX)
                picture.paste(
                    read_rgb_file(path).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST), (x, y)
                )
                for number, line in enumerate(_lines(text)):
                    place = (x, y + TILE_PX + number * LINE_PX)
                    pen.text(place, line, INK, ImageFont.load_default(TEXT_PT))
        y += height
    return picture


def _height(row: str | Sequence[Tile]) -> int:
    if isinstance(row, str):
        return 2 * GAP_PX + LINE_PX + GAP_PX
    return TILE_PX + GAP_PX + LINE_PX * max(len(_lines(text)) for _, text in row)


def _lines(text: str) -> list[str]:
    return textwrap.wrap(text, LETTERS_PER_TILE)


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
