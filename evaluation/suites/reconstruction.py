"""How well an autoencoder gives back the images it was shown: each by itself, and all of them as a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.config import UserError
from evaluation.features.interface import IMAGES_PER_CALL, FeatureExtractor
from evaluation.manifest import ImageSet, Item
from evaluation.metrics.frechet import FeatureStatistics, caveat, frechet_distance
from evaluation.metrics.lpips import Lpips
from evaluation.metrics.psnr import Rounding, psnr_db
from evaluation.metrics.ssim import ssim
from evaluation.runner import Measurement, SetScore


class ReconstructionSuite:
    """`result` against `original`; implements evaluation.runner.Suite and SetSuite.

    PSNR and SSIM always; LPIPS where VGG16 is at hand; for every entry of `distances` (metric name -> feature
    network) the Fréchet distance between all results and all originals: rFID with Inception's features, a
    number of its own with any other's. `rounding` says how the results became 8 bits, for the record.
    """

    name = "reconstruction"
    roles = ("result", "original")

    def __init__(
        self,
        lpips: Lpips | None = None,
        distances: Mapping[str, FeatureExtractor] | None = None,
        rounding: Rounding = "truncate",
    ) -> None:
        self._lpips = lpips
        self._distances = dict(distances or {})
        self.protocol: dict[str, Any] = {
            "pixels": f"uint8, rounding of the results: {rounding}",
            "psnr_db": "uint8, dB per image, mean of dB",
            "ssim": "uint8, data range 1, Gaussian window 11 px, sigma 1.5, reflected borders count",
        }
        self.fingerprints: dict[str, str] = {}
        if lpips is not None:
            self.protocol["lpips"] = "v0.1, VGG16, uint8 scaled to [-1, 1]"
            self.fingerprints["lpips"] = lpips.fingerprint
        for metric, extractor in self._distances.items():
            self.protocol[metric] = {
                "distance": "Fréchet, results against originals of this set, sums in fp64",
                **extractor.protocol,
            }
            self.fingerprints[metric] = extractor.fingerprint

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """psnr_db, ssim and, with a network for it, lpips of every item. Raises UserError: sizes differ."""
        found = []
        for result, original in zip(*(_read(images, items, role) for role in self.roles), strict=True):
            if result.shape != original.shape:
                sizes = " and ".join(f"{x.shape[3]} x {x.shape[2]}" for x in (result, original))
                raise UserError(f"{images.directory}: a result and its original differ in size: {sizes}")
            values = {"psnr_db": psnr_db(result, original).tolist(), "ssim": ssim(result, original).tolist()}
            if self._lpips is not None:
                values["lpips"] = self._lpips(result, original).tolist()
            found += [
                Measurement(dict(zip(values, numbers, strict=True)))
                for numbers in zip(*values.values(), strict=True)
            ]
        return found

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The distance of every feature network. Raises UserError: fewer than two images."""
        scores = {}
        for metric, extractor in self._distances.items():
            result, original = (
                FeatureStatistics.stream(
                    extractor.fingerprint, (extractor(pixels) for pixels in _read(images, items, role))
                )
                for role in self.roles
            )
            value = frechet_distance(result, original)
            scores[metric] = SetScore(value, n=result.count, note=caveat(result, original))
        return scores


def _read(images: ImageSet, items: Sequence[Item], role: str) -> Iterator[Tensor]:
    """uint8 [B, 3, H, W], a few images at a time."""
    for start in range(0, len(items), IMAGES_PER_CALL):
        yield images.read_all(items[start : start + IMAGES_PER_CALL], role)
