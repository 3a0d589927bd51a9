"""Reads images in a fixed order, a few at a time: an image set, a folder, or arr_0 of an .npz file.

A suite reads its set as images of one size (FileImages), of any sizes (LooseImages), or as pairs
(ImagePairs).

Shapes: N images, H W pixels.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from base import files, limits
from base.config import UserError
from data.image_set import ImageSet, Item, write_image, write_manifest
from data.samples.images import IMAGE_PARTS, read_rgb_file
from data.sources.folder_walk import images_below

ARRAY_NAME = "arr_0"
NPZ_NAME = "npz.json"
DAMAGED = (zipfile.BadZipFile, zlib.error)


BlockT_co = TypeVar("BlockT_co", covariant=True)


class Source(Protocol[BlockT_co]):
    """The images that rows of numbers are computed from, in blocks."""

    @property
    def digest(self) -> str:
        """Hash of every byte of every image, in order."""

    def __len__(self) -> int:
        """N, the number of images."""

    def read(self, start: int, stop: int) -> BlockT_co:
        """The images from `start` to `stop` - 1. Raises UserError: no readable image, sizes differ."""


class ImageSource(Source[Tensor], Protocol):
    """Images of one size, as feature networks take them."""

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, 3, H, W]. Raises UserError: no readable image, sizes differ."""


class FileImages:
    """Image files in the given order, of one size; implements ImageSource."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    @classmethod
    def of_set(cls, images: ImageSet, items: Sequence[Item], role: str) -> FileImages:
        """One role of an image set, in the manifest's order."""
        return cls([images.path(item, role) for item in items])

    @classmethod
    def of_folder(cls, folder: Path) -> FileImages:
        """Every image below a folder, in the order of the paths. Raises UserError: no images."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one that holds images, or an .npz file")
        found = images_below(folder)
        if not found.names:
            raise UserError(f"{folder}: holds no image; supported: {', '.join(IMAGE_PARTS)}")
        found.tell_others()
        return cls(found.paths)

    @cached_property
    def digest(self) -> str:
        """Hash of the files' hashes."""
        return files.digest([files.sha256(path) for path in self.paths])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, start: int, stop: int) -> Tensor:
        """The files' pixels, uint8 [stop - start, 3, H, W]."""
        images = self.read_each(start, stop)
        for path, image in zip(self.paths[start:stop], images, strict=True):
            if image.shape != images[0].shape:
                sizes = f"{_size(images[0])} and {_size(image)}"
                raise UserError(f"{path}: images of one set must be of one size, not {sizes}")
        return torch.stack(images)

    def read_each(self, start: int, stop: int) -> list[Tensor]:
        """uint8 [3, H, W] of any sizes. Raises UserError: no readable image."""
        pictures = map(read_rgb_file, self.paths[start:stop])
        return [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]


@dataclass(frozen=True)
class LooseImages:
    """Image files of any sizes; implements Source."""

    files: FileImages

    @property
    def digest(self) -> str:
        """Hash of the files' hashes."""
        return self.files.digest

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> list[Tensor]:
        """Each image as uint8 [3, H, W]."""
        return self.files.read_each(start, stop)


@dataclass(frozen=True)
class ImagePairs:
    """Each image beside the image that it is compared with; implements Source."""

    first: FileImages
    second: FileImages

    @property
    def digest(self) -> str:
        """Hash of both sources' digests."""
        return files.digest([self.first.digest, self.second.digest])

    def __len__(self) -> int:
        return len(self.first)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Both sources' images, uint8 [stop - start, 3, H, W] each. Raises UserError also if the two differ in size."""
        first, second = self.first.read(start, stop), self.second.read(start, stop)
        if first.shape != second.shape:
            paths = f"{self.first.paths[start]} and {self.second.paths[start]}"
            raise UserError(f"{paths} differ in size: {_size(first)} and {_size(second)}")
        return first, second


class RoleImages:
    """Images of one role in the set that a suite reads. They are cached, because their digest reads every file."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._last: tuple[str, FileImages] | None = None

    def of(self, images: ImageSet, items: Sequence[Item]) -> FileImages:
        """The role's images, in the order of `items`."""
        found = FileImages.of_set(images, items, self._role)
        state = files.digest([[str(path), *_state(path)] for path in found.paths])
        if self._last is None or self._last[0] != state:
            self._last = state, found
        return self._last[1]


@dataclass(frozen=True)
class NpzImages:
    """`arr_0`, uint8 [N, H, W, 3], of an .npz file as ADM publishes them; implements ImageSource.

    Stored arrays are read in place. Compressed arrays cannot be, and are refused.
    """

    path: Path
    shape: tuple[int, int, int, int]  # N, H, W, 3
    offset: int  # offset of the first pixel in the file, in bytes

    @classmethod
    def open(cls, path: Path) -> NpzImages:
        """Opens an .npz file. Raises UserError: no such file, no such array, another layout."""
        with reading_npz(path), _zip(path) as archive:
            names = archive.namelist()
            if f"{ARRAY_NAME}.npy" not in names:
                raise UserError(f"{path}: has no array '{ARRAY_NAME}' (there are: {', '.join(names)})")
            entry = archive.getinfo(f"{ARRAY_NAME}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{path}: its arrays are compressed; store it again with numpy.savez")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = read_header(file)
                offset = _data_offset(path, entry) + file.tell()
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(f"{path}: '{ARRAY_NAME}' is {dtype} {list(shape)}; expected uint8 [N, H, W, 3]")
        return cls(path, shape, offset)

    @cached_property
    def digest(self) -> str:
        """Hash of the file."""
        return files.sha256(self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """The images' pixels; only their bytes are read."""
        image_bytes = int(np.prod(self.shape[1:]))
        with limits.open_file(self.path) as file:
            file.seek(self.offset + start * image_bytes)
            payload = file.read((stop - start) * image_bytes)
        if len(payload) != (stop - start) * image_bytes:
            raise UserError(f"{self.path}: ends before image {stop}; fetch it again")
        pixels = np.frombuffer(bytearray(payload), np.uint8).reshape(stop - start, *self.shape[1:])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def write_npz_set(path: Path, out: Path) -> int:
    """Writes an .npz file's images as an image set (role `result`) to score and look at; returns their number.

    Images of an earlier run are kept; a set of another file is refused. Raises UserError as NpzImages.open.
    """
    images = NpzImages.open(path)
    about = {"npz": images.digest}
    if (out / NPZ_NAME).is_file() and files.read_json(out / NPZ_NAME) != about:
        raise UserError(f"{out}: holds the images of another file; give another --out")
    files.write_json(out / NPZ_NAME, about)
    items = [Item(f"{index:06d}", {"result": f"{index:06d}.png"}, {}) for index in range(len(images))]
    for index, item in enumerate(items):
        if not (out / item.images["result"]).is_file():
            write_image(out / item.images["result"], images.read(index, index + 1)[0])
    write_manifest(out, items)
    return len(items)


def _state(path: Path) -> tuple[int, int]:
    """Size and modification time: another file of this name differs in one of them."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _size(image: Tensor) -> str:
    """The size of [..., H, W] in words."""
    return f"{image.shape[-1]} x {image.shape[-2]}"


@contextlib.contextmanager
def reading_npz(path: Path) -> Iterator[None]:
    """Context for reading an .npz file. Raises UserError: a damaged file, or none of this format."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError,
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        *DAMAGED,
    ) as error:
        raise UserError(
            f"{path}: is no .npz file, or a damaged one ({type(error).__name__}); fetch it again"
        ) from None


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        limits.check_regular(path)
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an .npz file with images") from None
    except (zipfile.BadZipFile, OSError):
        raise UserError(f"{path}: is no .npz file; fetch it again") from None


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Offset of a stored entry's bytes: after its local header, which gives its own lengths."""
    with limits.open_file(path) as file:
        return _local_header_end(file, entry.header_offset)


def _local_header_end(file: BinaryIO, start: int) -> int:
    file.seek(start)
    header = file.read(30)  # PKZIP's local file header; the lengths of name and extra field stand at its end
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return start + 30 + name_bytes + extra_bytes
