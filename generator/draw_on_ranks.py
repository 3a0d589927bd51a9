"""Draws an image set on several ranks, resumably, for any kind of drawing.

Images are drawn in blocks of neighbours of a list, and a block is always drawn as a whole. Matrix products may round
differently in another batch, so whole blocks make the images the same bytes on any number of ranks and after any
interruption. `sampling.json` says what the images were drawn with; a run with other settings is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from base import files
from base.config import UserError, to_dict
from base.progress import ProgressLine
from base.team import Team
from base.terminal import say
from data.image_set import MANIFEST_NAME, Item, write_manifest
from generator.model import CONFIG_NAME, WEIGHTS_NAME
from generator.sampling_config import DrawingConfig
from generator.solvers import num_evaluations

COMMAND = "sample"
SETTINGS_NAME = "sampling.json"


class Drawing(Protocol):
    """One image to draw."""

    def is_done(self, out: Path) -> bool:
        """Whether all files of the image exist."""


DrawingT = TypeVar("DrawingT", bound=Drawing)
DrawnT = TypeVar("DrawnT")
Draw = Callable[[Sequence[DrawingT]], DrawnT]
Write = Callable[[Sequence[DrawingT], DrawnT], None]


def draw_on_ranks(
    drawings: Sequence[DrawingT],
    out: Path,
    *,
    block_images: int,
    drawn_with: Mapping[str, Any],
    start: Callable[[], Draw[DrawingT, DrawnT]],
    write: Write[DrawingT, DrawnT],
    item: Callable[[DrawingT], Item],
    team: Team,
    in_step: bool = False,
) -> int:
    """Draws blocks i with i % world == rank; the first rank writes the manifest. Returns the set's size.

    The set is whole when the function returns. Images that an earlier run finished are kept. `drawn_with`: all that
    decides the images. `start` returns the function that draws a block; it is called only if a block is left to draw.
    `in_step`: all ranks draw equally many blocks, some only to take part, because the drawing is collective. Raises
    UserError: `out` was drawn with other settings, or holds a stranger's files.
    """
    blocks = [drawings[first : first + block_images] for first in range(0, len(drawings), block_images)]
    mine = [block for block in blocks[team.rank :: team.world] if not all(one.is_done(out) for one in block)]
    items = [item(one) for one in drawings]
    names = {Path(name).parts[0] for one in items for name in one.images.values()} | {
        MANIFEST_NAME,
        SETTINGS_NAME,
    }
    files.check_claim(out, COMMAND, names, _is_drawn)
    if team.rank == 0:
        _check_settings(out, drawn_with)
    files.claim(out, COMMAND, names, _is_drawn)
    if team.rank == 0:
        files.write_json(out / SETTINGS_NAME, dict(drawn_with))
    most = -(-len(blocks) // team.world) if in_step else len(mine)
    draw = start() if most else None
    team.barrier()  # until then no rank writes into a folder that rank 0 may refuse
    if draw is not None:
        _draw_blocks(mine, draw, write, team.rank)
        for _ in range(most - len(mine)):
            draw(blocks[0])
    team.barrier()
    if team.rank == 0:
        write_manifest(out, items)
    team.barrier()
    return len(drawings)


def announce(sampling: DrawingConfig) -> None:
    """Prints what an image costs, as one line."""
    evaluations = num_evaluations(sampling.num_steps, sampling.solver)
    line = f"{sampling.num_steps} {sampling.solver} steps, {evaluations} evaluations an image"
    say(line, sys.stderr)


def sampling_settings(sampling: DrawingConfig) -> dict[str, Any]:
    """The sampling without `batch_images`, which may change between two runs: it matters for rounding only."""
    settings = to_dict(sampling)
    del settings["batch_images"]
    return settings


def export_digest(folder: Path) -> str:
    """Digest of an exported generator's config and weights. Raises UserError: a file is missing."""
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; give a run with an exported generator")
    return files.digest([files.sha256(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)])


def _draw_blocks(
    blocks: Sequence[Sequence[DrawingT]],
    draw: Draw[DrawingT, DrawnT],
    write: Write[DrawingT, DrawnT],
    rank: int,
) -> None:
    """Draws every block while the block before is written, with a line about progress."""
    if not blocks:
        return
    total, done = sum(len(block) for block in blocks), 0
    progress = ProgressLine(f"rank {rank}: {total} images to draw", "images")
    with ThreadPoolExecutor(max_workers=1) as writer:  # the next block is drawn while PNGs are compressed
        writing: Future[None] | None = None
        for block in blocks:
            drawn = draw(block)
            if writing is not None:
                writing.result()
            writing = writer.submit(write, block, drawn)
            done += len(block)
            progress.show(done, done / total)
        if writing is not None:
            writing.result()


def _check_settings(out: Path, drawn_with: Mapping[str, Any]) -> None:
    """Raises UserError if the images in `out` were drawn with other settings."""
    path, settings = out / SETTINGS_NAME, dict(drawn_with)
    found: dict[str, Any] = files.read_json(path) if path.is_file() else settings
    for name in sorted({*found, *settings}):
        if found.get(name) != settings.get(name):
            raise UserError(
                f"{out}: holds images of other settings ({name}: {_short(found.get(name))} there, "
                f"{_short(settings.get(name))} here); give another folder, or the same settings to go on"
            )


def _is_drawn(out: Path) -> bool:
    """Whether an earlier version, which left no marker file, drew there."""
    try:
        return isinstance(files.read_json(out / SETTINGS_NAME), dict)
    except (OSError, ValueError):
        return False


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
