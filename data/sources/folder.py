"""A folder of images with captions or class labels -> samples. Files are stored as they are, after a look inside."""

from __future__ import annotations

import bisect
import json
from pathlib import Path

from data.images import IMAGE_PARTS, decode_image
from data.shards import Sample
from data.sources.base import BadItemError
from engine import files
from engine.config import UserError


class FolderSource:
    """Images below a folder; implements data.sources.base.Source.

    With `labels`, there are no captions: every folder below `images` is a class, numbered in sorted order, and json
    holds its number and name, as tokenizers and class-conditional generators need (ImageNet's layout).
    Otherwise captions come from a jsonl file with one {"file": path below the folder, "caption": text} a line, in whose
    order the samples are, or without it from NAME.txt beside every image, in the order of the paths.
    """

    def __init__(self, images: Path, captions: Path | None = None, *, labels: bool = False) -> None:
        """Raises UserError: no such folder or file, no images, captions and labels at once."""
        if labels and captions is not None:
            raise UserError("give --captions or --labels, not both: labels are the names of the folders")
        self._images = images
        if not images.is_dir():
            raise UserError(f"{images}: no such folder; give --images the folder that holds the images")
        if captions is None:
            found = (path for path in images.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_PARTS)
            self._paths = sorted(path.relative_to(images).as_posix() for path in found)
            self._lines: list[str] | None = None
            if labels:
                self._paths = [path for path in self._paths if "/" in path]
            digest = files.digest(self._paths)
        else:
            if not captions.is_file():
                raise UserError(f"{captions}: no such file; give --captions a jsonl file")
            self._lines = [line for line in captions.read_text().splitlines() if line.strip()]
            self._where = str(captions)
            digest = files.sha256(captions)
        if not len(self):
            raise UserError(f"{captions or images}: lists no image; supported: {', '.join(IMAGE_PARTS)}")
        self._classes: list[str] | None = None
        if labels:
            self._classes = sorted({path.partition("/")[0] for path in self._paths})
        kind = "captions" if self._classes is None else f"{len(self._classes)} classes"
        self.description = f"folder {images.name} with {kind}, listing {digest[:12]}"

    def __len__(self) -> int:
        """Number of images, good and bad."""
        return len(self._paths if self._lines is None else self._lines)

    def sample(self, index: int) -> Sample:
        """Raises BadItemError: unreadable image, no caption, empty caption, bad jsonl line."""
        key = f"image-{index:09d}"
        name, meta = self._from_folder(index) if self._classes else self._with_caption(key, index)
        path = self._images / name
        suffix = path.suffix.lower().lstrip(".")
        if suffix not in IMAGE_PARTS:
            raise BadItemError(key, f"{path}: not one of {', '.join(IMAGE_PARTS)}")
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise BadItemError(key, f"{path}: cannot be read ({error.strerror})") from None
        part = "jpg" if suffix == "jpeg" else suffix
        text = json.dumps({**meta, "file": name}, sort_keys=True)
        sample = Sample(key, {part: payload, "json": text.encode()})
        try:
            decode_image(sample, part)
        except UserError:
            raise BadItemError(
                key, f"{path}: not a readable image; repair it, or run with --reject-bad"
            ) from None
        return sample

    def _from_folder(self, index: int) -> tuple[str, dict[str, int | str]]:
        assert self._classes is not None
        name = self._paths[index]
        label = bisect.bisect_left(self._classes, name.partition("/")[0])
        return name, {"label": label, "class": self._classes[label]}

    def _with_caption(self, key: str, index: int) -> tuple[str, dict[str, int | str]]:
        name, caption = self._from_line(key, index) if self._lines else self._from_sidecar(key, index)
        if not caption.strip():
            raise BadItemError(
                key, f"{self._images / name}: empty caption; write one, or run with --reject-bad"
            )
        return name, {"caption": caption.strip()}

    def _from_line(self, key: str, index: int) -> tuple[str, str]:
        assert self._lines is not None
        try:
            tree = json.loads(self._lines[index])
            name, caption = tree["file"], tree["caption"]
        except (ValueError, KeyError, TypeError):
            name = caption = None
        if not isinstance(name, str) or not isinstance(caption, str):
            raise BadItemError(
                key, f'{self._where}: entry {index + 1}: expected {{"file": ..., "caption": ...}}'
            )
        return name, caption

    def _from_sidecar(self, key: str, index: int) -> tuple[str, str]:
        name = self._paths[index]
        try:
            return name, (self._images / name).with_suffix(".txt").read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadItemError(
                key, f"{self._images / name}: no caption in a .txt beside it ({error})"
            ) from None
