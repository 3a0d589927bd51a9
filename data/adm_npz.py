"""Writes image sets as the .npz of ADM's evaluation code (Dhariwal and Nichol 2021): arr_0, uint8 [N, H, W, 3]."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from base import files
from data.image_set import ImageSet

ARRAY = "arr_0.npy"
IMAGES_PER_READ = 64
SIGN = "written by RPiAE"
"""Comment at the archive's end. A file with this comment may be replaced."""
EPOCH = (1980, 1, 1, 0, 0, 0)  # time of the archive's entry: fixed, so that equal images give equal bytes


def write_npz(images: ImageSet, path: str | Path, role: str = "result") -> None:
    """Writes all images in the manifest's order, a few at a time: 50,000 of 256 px are 9.8 GB. The write is atomic.

    Raises UserError: another file at `path`; an image that is missing, unreadable, or of another size than the first.
    """
    path = Path(path)
    files.check_signed(path, SIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    first = images.items[0]
    _, height, width = images.read(first, role).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images.items), height, width, 3)}
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(zipfile.ZipInfo(ARRAY, EPOCH), "w", force_zip64=True) as array,
        ):
            archive.comment = SIGN.encode()
            np.lib.format.write_array_header_1_0(array, header)
            for start in range(0, len(images.items), IMAGES_PER_READ):
                some = images.items[start : start + IMAGES_PER_READ]
                pixels = images.read_all([first, *some], role)[1:]  # refuses another size than the first's
                array.write(pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    files.fsync_directory(path.parent)
