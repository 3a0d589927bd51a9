"""Reads files of prompts and edits, one item for each image to draw.

NAME.txt    one prompt a line; empty lines are skipped
NAME.jsonl  one object a line: {"prompt": text} draws, {"image": file or list of files, "instruction": text} edits.
            "key" names the images (default: the item's number), "seed" is that of its first image (default: derived
            from key and the run's seed); all other fields are passed on. Files are looked for beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base import files
from base.config import UserError
from data.samples.captions import check_whole, clean_text, read_object
from data.sources.text_files import read_text, split_lines
from generator.sampling_config import SEEDS

KEY_PATTERN = re.compile(r"[\w+-][\w+.-]{0,127}")


@dataclass(frozen=True)
class Prompt:
    """One item of the file."""

    key: str
    """Unique in the file; a file name without suffix."""
    text: str
    """Prompt or instruction."""
    images: tuple[Path, ...]
    """Sources to edit; none for a prompt."""
    seed: int | None
    """Seed of the item's first image; None: derived from key and the run's seed."""
    meta: Mapping[str, Any]
    """The item as in the file, without key, seed and image."""

    def image_seed(self, number: int, run_seed: int) -> int:
        """Seed of the item's image `number`, 32 bits. It does not depend on the item's place in the file."""
        if self.seed is not None:
            return (self.seed + number) % SEEDS
        return int(files.digest(["image", run_seed, self.key, number])[:8], 16)


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """All items, in the file's order.

    Raises UserError naming the line: no such file, another suffix, no items, bad JSON, an item without its text, half
    a character in a text, a missing image file, a key that is no file name or is used twice, a bad seed.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path}: give a .txt file (one prompt a line) or a .jsonl file (one object a line)")
    lines = split_lines(read_text(path))
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (path.suffix == ".txt" and not clean_text(line)):
            continue
        row = {"prompt": clean_text(line)} if path.suffix == ".txt" else _object(line, f"{path}:{number}")
        prompt = _prompt(row, len(prompts), path.parent, where=f"{path}:{number}")
        if prompt.key in prompts:
            raise UserError(f"{path}:{number}: key '{prompt.key}' stands there twice; keys must be unique")
        prompts[prompt.key] = prompt
    if not prompts:
        raise UserError(f"{path}: holds no prompts; write one a line")
    return tuple(prompts.values())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        return read_object(line.encode())
    except ValueError as error:
        raise UserError(
            f'{where}: not valid JSON ({error}); expected an object such as {{"prompt": "a red apple"}}'
        ) from None


def _prompt(row: Mapping[str, Any], index: int, folder: Path, where: str) -> Prompt:
    named = row.get("image", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: 'image' is the name of a file or a list of such names")
    try:
        images = tuple(files.inside(folder, name) for name in names)
    except UserError as error:
        raise UserError(f"{where}: 'image' {error}; images are looked for beside the prompts") from None
    for image in images:
        if not image.is_file():
            raise UserError(f"{where}: {image}: no such file; images are looked for beside the prompts")
    wanted, other = ("instruction", "an 'image'") if images else ("prompt", "no 'image'")
    text = row.get(wanted)
    if not isinstance(text, str) or not clean_text(text):
        raise UserError(f"{where}: an item with {other} needs a '{wanted}' that is not empty")
    key, seed = row.get("key", f"{index:05d}"), row.get("seed")
    if not isinstance(key, str | int) or not KEY_PATTERN.fullmatch(str(key)):
        raise UserError(f"{where}: key {key!r} names files; use letters, digits and _ + - . (not first)")
    if seed is not None and (type(seed) is not int or not 0 <= seed < SEEDS):
        raise UserError(f"{where}: seed {seed!r} is not a whole number from 0 to {SEEDS - 1}")
    meta = {name: value for name, value in row.items() if name not in ("key", "seed", "image")}
    return Prompt(str(key), check_whole(text, f"{where}: '{wanted}'"), images, seed, meta)
