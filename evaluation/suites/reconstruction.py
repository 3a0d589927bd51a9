"""How well an autoencoder gives back the images it was shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.manifest import ImageSet, Item
from evaluation.metrics.psnr import psnr_db
from evaluation.runner import Measurement


class ReconstructionSuite:
    """PSNR of `result` against `original`; implements evaluation.runner.Suite."""

    name = "reconstruction"
    roles = ("result", "original")
    protocol: Mapping[str, Any] = {"psnr_db": "uint8, dB per image, mean of dB"}
    fingerprints: Mapping[str, str] = {}

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """psnr_db of every item."""
        results, originals = (images.read_all(items, role) for role in self.roles)
        return [Measurement({"psnr_db": value}) for value in psnr_db(results, originals).tolist()]
