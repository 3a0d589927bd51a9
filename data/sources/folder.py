"""A folder of images with captions -> samples. The image files are stored as they are, after a look inside."""

from __future__ import annotations

import json
from pathlib import Path

from data.images import IMAGE_PARTS, decode_image
from data.shards import Sample
from data.sources.base import BadItemError
from engine import files
from engine.config import UserError


class FolderSource:
    """Images below a folder; implements data.sources.base.Source.

    Captions come from a jsonl file with one {"file": path below the folder, "caption": text} a line, in whose
    order the samples are, or without it from NAME.txt beside every image, in the order of the paths.
    """

    def __init__(self, images: Path, captions: Path | None = None) -> None:
        """Raises UserError: no such folder or file, no images."""
        self._images = images
        if not images.is_dir():
            raise UserError(f"{images}: no such folder; give --images the folder that holds the images")
        if captions is None:
            found = (path for path in images.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_PARTS)
            self._paths = sorted(path.relative_to(images).as_posix() for path in found)
            self._lines: list[str] | None = None
            digest = files.digest(self._paths)
        else:
            if not captions.is_file():
                raise UserError(f"{captions}: no such file; give --captions a jsonl file")
            self._lines = [line for line in captions.read_text().splitlines() if line.strip()]
            self._where = str(captions)
            digest = files.sha256(captions)
        if not len(self):
            raise UserError(f"{captions or images}: lists no image; supported: {', '.join(IMAGE_PARTS)}")
        self.description = f"folder {images.name} with captions, listing {digest[:12]}"

    def __len__(self) -> int:
        """Number of images, good and bad."""
        return len(self._paths if self._lines is None else self._lines)

    def sample(self, index: int) -> Sample:
        """Raises BadItemError: unreadable image, no caption, empty caption, bad jsonl line."""
        key = f"image-{index:09d}"
        name, caption = self._from_line(key, index) if self._lines else self._from_sidecar(key, index)
        path = self._images / name
        if not caption.strip():
            raise BadItemError(key, f"{path}: empty caption; write one, or run with --reject-bad")
        suffix = path.suffix.lower().lstrip(".")
        if suffix not in IMAGE_PARTS:
            raise BadItemError(key, f"{path}: not one of {', '.join(IMAGE_PARTS)}")
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise BadItemError(key, f"{path}: cannot be read ({error.strerror})") from None
        part = "jpg" if suffix == "jpeg" else suffix
        text = json.dumps({"caption": caption.strip(), "file": name}, sort_keys=True)
        sample = Sample(key, {part: payload, "json": text.encode()})
        try:
            decode_image(sample, part)
        except UserError:
            raise BadItemError(
                key, f"{path}: not a readable image; repair it, or run with --reject-bad"
            ) from None
        return sample

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
