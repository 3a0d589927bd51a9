"""The reference that generated images are compared with: real images, or the statistics that ADM publishes of them.

An ADM .npz holds `mu`, `sigma` (pool3) and `mu_s`, `sigma_s` (spatial) of the whole data set, and in `arr_0` 10,000
of its images for precision and recall. From a folder or an image set the statistics are computed.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base import files, limits
from base.config import UserError
from data.image_set import MANIFEST_NAME, ImageSet
from evaluation.image_source import ARRAY_NAME, FileImages, ImageSource, NpzImages, reading_npz
from evaluation.metrics.frechet import F64

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features; fp64."""

    mean: F64
    covariance: F64


@dataclass(frozen=True)
class Reference:
    """A reference: images, statistics, or both."""

    name: str
    """Name of the file or folder, for the record."""
    digest: str
    images: ImageSource | None
    pool: Gaussian | None = None
    """Statistics of Inception's pool3; None: computed from the images."""
    spatial: Gaussian | None = None
    """Statistics of Inception's spatial features; None: computed from the images."""

    @classmethod
    def open(cls, path: Path) -> Reference:
        """Opens an .npz file, an image set (its `original` images, else its `result`), or a folder of images.

        Raises UserError: none of the three, an incomplete file, no images.
        """
        if path.suffix == ".npz":
            with reading_npz(path):
                return _open_npz(path)
        if (path / MANIFEST_NAME).is_file():
            images = ImageSet.open(path)
            role = "original" if "original" in images.items[0].images else "result"
            source = FileImages.of_set(images, images.items, role)
        else:
            source = FileImages.of_folder(path)
        return cls(path.name, source.digest, source)


def _open_npz(path: Path) -> Reference:
    try:
        limits.check_regular(path)
        with np.load(path, allow_pickle=False) as stored:
            limits.check_members(stored.zip, [f"{name}.npy" for pair in STATISTICS.values() for name in pair])
            names = set(stored.files)
            found = {}
            for kind, (mean, covariance) in STATISTICS.items():
                if mean in names and covariance in names:
                    found[kind] = Gaussian(
                        stored[mean].astype(np.float64), stored[covariance].astype(np.float64)
                    )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give ADM's reference, or a folder of images") from None
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: is no readable .npz file ({reason}); fetch it again") from None
    if not found and ARRAY_NAME not in names:
        wanted = ", ".join(name for pair in STATISTICS.values() for name in pair)
        raise UserError(
            f"{path}: holds neither {ARRAY_NAME} nor {wanted} (there are: {', '.join(sorted(names))})"
        )
    for one in found.values():
        if one.mean.ndim != 1 or one.covariance.shape != (len(one.mean), len(one.mean)):
            raise UserError(
                f"{path}: mean {one.mean.shape} and covariance {one.covariance.shape} do not fit each other"
            )
    images = NpzImages.open(path) if ARRAY_NAME in names else None
    digest = images.digest if images is not None else files.sha256(path)
    return Reference(path.name, digest, images, found.get("pool"), found.get("spatial"))
