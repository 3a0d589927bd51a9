"""How well an autoencoder reconstructs images: each image by itself, and all images as a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base import files
from base.config import UserError
from data.image_set import ImageSet, Item
from evaluation.features.feature_files import FeatureFiles, ScoreFiles
from evaluation.features.interface import FeatureExtractor
from evaluation.image_source import ImagePairs, RoleImages
from evaluation.metrics.frechet import FeatureStatistics, caveat, frechet_distance
from evaluation.metrics.reconstruction import Lpips, Rounding, psnr_db, ssim
from evaluation.runner import Measurement, SetScore

Pair = tuple[Tensor, Tensor]


class PairScores:
    """psnr_db, ssim and, with a network for it, lpips of two images; implements RowFunction."""

    def __init__(self, lpips: Lpips | None) -> None:
        self._lpips = lpips
        self.protocol = {
            "psnr_db": "uint8, dB per image, mean of dB",
            "ssim": "uint8, data range 1, Gaussian window 11 px, sigma 1.5, reflected borders count",
        }
        if lpips is not None:
            self.protocol["lpips"] = "v0.1, VGG16, uint8 scaled to [-1, 1]"
        self.metrics = tuple(self.protocol)
        self.name, self.dim = ", ".join(self.metrics), len(self.metrics)
        self.fingerprint = files.digest([self.protocol, lpips and lpips.fingerprint])

    def __call__(self, pair: Pair, /) -> Tensor:
        """uint8 [B, 3, H, W] twice -> float64 [B, metrics]; nan: not defined for images of this size."""
        columns = [psnr_db(*pair), ssim(*pair)]
        if self._lpips is not None:
            distance = self._lpips(*pair)
            if not bool(distance.isfinite().all()):
                raise UserError("lpips: some distances are not finite; look at VGG16's weights")
            columns.append(distance.double())
        return torch.stack(columns, dim=1)


class ReconstructionSuite:
    """`result` against `original`; implements Suite, SetSuite and CollectingSuite of evaluation.runner.

    PSNR and SSIM are always scored, LPIPS if VGG16 is given. Every entry of `distances` (metric name -> feature
    network) adds the Fréchet distance between all results and all originals: rFID with Inception's features, a separate
    metric with any other network's. Scores of pairs and features go to `store`. `rounding` says how the results became
    8 bits, for the record.
    """

    name = "reconstruction"
    roles = ("result", "original")

    def __init__(
        self,
        store: Path,
        lpips: Lpips | None = None,
        distances: Mapping[str, FeatureExtractor] | None = None,
        rounding: Rounding = "truncate",
    ) -> None:
        self._store, self._pair_scores = store, PairScores(lpips)
        self._distances = dict(distances or {})
        self._images = {role: RoleImages(role) for role in self.roles}
        self.protocol: dict[str, Any] = {
            "pixels": f"uint8, rounding of the results: {rounding}",
            **self._pair_scores.protocol,
        }
        self.fingerprints: dict[str, str] = {}
        if lpips is not None:
            self.fingerprints["lpips"] = lpips.fingerprint
        for metric, extractor in self._distances.items():
            self.protocol[metric] = {
                "distance": "Fréchet, results against originals of this set, sums in fp64",
                **extractor.protocol,
            }
            self.fingerprints[metric] = extractor.fingerprint

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Computes scores of pairs and features that are not in the store yet. Raises UserError: sizes differ."""
        self._pairs(images, items).collect(rank, world)
        for extractor in self._distances.values():
            for features in self._features(extractor, images, items):
                features.collect(rank, world)

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """psnr_db, ssim and, with a network for it, lpips of every item."""
        metrics = self._pair_scores.metrics
        return [
            Measurement(dict(zip(metrics, row, strict=True)))
            for block in self._pairs(images, items).blocks()
            for row in block.tolist()
        ]

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The Fréchet distance by every feature network. Raises UserError: fewer than two images."""
        scores = {}
        for metric, extractor in self._distances.items():
            result, original = (
                FeatureStatistics.stream(features.fingerprint, features.blocks())
                for features in self._features(extractor, images, items)
            )
            value = frechet_distance(result, original)
            scores[metric] = SetScore(value, n=result.count, note=caveat(result, original))
        return scores

    def _pairs(self, images: ImageSet, items: Sequence[Item]) -> ScoreFiles[Pair]:
        result, original = (self._images[role].of(images, items) for role in self.roles)
        return ScoreFiles(self._store, self._pair_scores, ImagePairs(result, original))

    def _features(
        self, extractor: FeatureExtractor, images: ImageSet, items: Sequence[Item]
    ) -> list[FeatureFiles]:
        """Features of results and of originals."""
        return [
            FeatureFiles(self._store, extractor, self._images[role].of(images, items)) for role in self.roles
        ]
