"""Compares generated images with real images as a set: FID and its relatives, by ADM's protocol.

Every number is computed in a *feature space*. Inception's gives fid, sfid, inception_score, kid, precision and
recall; DINOv2's fd_dinov2; CLIP's cmmd; any other network's a feature_distance with its own kernel distance,
precision and recall, for places without the published networks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from base.config import UserError
from data.image_set import ImageSet, Item
from evaluation.config import Distances
from evaluation.features.feature_files import FeatureFiles, FeatureRows
from evaluation.features.inception import AdmInception
from evaluation.features.interface import FeatureExtractor
from evaluation.image_source import FileImages, ImageSource, RoleImages
from evaluation.metrics.frechet import FeatureStatistics, caveat, gaussian_distance
from evaluation.metrics.inception_score import SPLIT_IMAGES, inception_score
from evaluation.metrics.kernel_distance import CMMD_SCALE, CMMD_SIGMA, cmmd, kid
from evaluation.metrics.manifold import NEIGHBOURS, in_manifold, radii
from evaluation.metrics.rows import blocks
from evaluation.reference import Gaussian, Reference
from evaluation.runner import Measurement, SetScore

STANDARD_IMAGES = 50_000  # images behind the published numbers


@dataclass(frozen=True)
class Spaces:
    """The networks whose feature spaces are used."""

    inception: AdmInception | None = None
    dinov2: FeatureExtractor | None = None
    clip: FeatureExtractor | None = None
    other: FeatureExtractor | None = None

    def extractors(self) -> dict[str, FeatureExtractor]:
        """The networks that are set, by the name of their field."""
        found = {"inception": self.inception, "dinov2": self.dinov2, "clip": self.clip, "other": self.other}
        return {name: extractor for name, extractor in found.items() if extractor is not None}


class GenerationSuite:
    """`result` against a reference; implements Suite, SetSuite and CollectingSuite of evaluation.runner.

    Features go to `store`. `precision` is a rate over images (Wilson's interval); an image outside the reference's
    manifold is a failed item.
    """

    name = "generation"
    roles = ("result",)

    def __init__(
        self,
        reference: Reference,
        spaces: Spaces,
        store: Path,
        reference_store: Path | None = None,
        *,
        distances: Distances = "fp32",
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """`reference_store`: store of the reference's features, which serve many sets; None: `store`.

        `seed` draws KID's subsets. Raises UserError: no network; a reference that a network cannot use.
        """
        if not spaces.extractors():
            raise UserError(
                "generation: no feature network; give --inception, --dinov2, --clip or --features"
            )
        for name in spaces.extractors():
            if reference.images is None and (name != "inception" or reference.pool is None):
                raise UserError(
                    f"{reference.name}: holds statistics without images; they are of no use for '{name}'"
                )
        self._reference, self._spaces, self._store = reference, spaces, store
        self._reference_store = reference_store or store
        self._distances, self._seed, self._device = distances, seed, device
        self._results = RoleImages("result")
        self.protocol: Mapping[str, Any] = {
            "reference": reference.name,
            "statistics": "of the reference file"
            if reference.pool is not None
            else "of the reference images",
            "inception_score": f"mean over splits of {SPLIT_IMAGES} images in the manifest's order, no bias",
            "precision, recall": f"k = {NEIGHBOURS}, squared distances in {distances}, all reference images",
            "kid": "cubic kernel, unbiased, 100 subsets of at most 1000",
            "cmmd": f"Gaussian kernel, sigma {CMMD_SIGMA:g}, biased, times {CMMD_SCALE:g}",
            "sums": "fp64",
            **{name: dict(extractor.protocol) for name, extractor in spaces.extractors().items()},
        }
        self.fingerprints: Mapping[str, str] = {
            "reference": reference.digest,
            **{name: extractor.fingerprint for name, extractor in spaces.extractors().items()},
        }

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Computes features of results and reference images that are not in the store yet."""
        source = self._source(images, items)
        for extractor in self._spaces.extractors().values():
            self._files(extractor, source).collect(rank, world)
            if self._reference.images is not None:
                self._files(extractor, self._reference.images).collect(rank, world)

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """Whether each image lies in the reference's manifold."""
        source = self._source(images, items)
        columns = {name: self._precision(source, space).tolist() for name, space in self._manifolds().items()}
        return [
            Measurement({name: bool(inside[index]) for name, inside in columns.items()})
            for index in range(len(items))
        ]

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """All scores except precision."""
        return self._set_scores(self._source(images, items))

    def _source(self, images: ImageSet, items: Sequence[Item]) -> FileImages:
        return self._results.of(images, items)

    def _precision(self, source: ImageSource, space: str) -> Tensor:
        """bool [N]: which images lie in the reference's manifold."""
        samples, real = self._rows(space, source), self._reference_rows(space)
        return in_manifold(
            samples,
            real,
            radii(real, distances=self._distances, device=self._device),
            self._distances,
            self._device,
        )

    def _set_scores(self, source: ImageSource) -> dict[str, SetScore]:
        scores: dict[str, SetScore] = {}
        n = len(source)
        few = f"{n} images; published numbers use {STANDARD_IMAGES}" if n < STANDARD_IMAGES else ""
        if self._spaces.inception is not None:
            scores["fid"] = self._frechet(source, "inception", self._reference.pool)
            scores["sfid"] = self._frechet(source, "spatial", self._reference.spatial)
            splits = inception_score(self._rows("inception", source), self._spaces.inception.classifier)
            note = f"deviation of {len(splits)} splits {statistics.pstdev(splits):.3g}"
            scores["inception_score"] = SetScore(
                statistics.fmean(splits), n, "; ".join(filter(None, (note, few)))
            )
        if self._spaces.dinov2 is not None:
            scores["fd_dinov2"] = self._frechet(source, "dinov2", None)
        if self._spaces.other is not None:
            scores["feature_distance"] = self._frechet(source, "other", None)
        if self._spaces.clip is not None:
            rows = self._rows("clip", source), self._reference_rows("clip")
            scores["cmmd"] = SetScore(cmmd(*rows, self._device), n)
        for suffix, space in self._manifolds(prefix="").items():
            samples, real = self._rows(space, source), self._reference_rows(space)
            found = kid(samples, real, seed=self._seed)
            note = f"deviation of {found.num_subsets} subsets of {found.subset_images}: {found.std:.2g}"
            scores[f"kid{suffix}"] = SetScore(found.mean, n, note)
            own = radii(samples, distances=self._distances, device=self._device)
            inside = in_manifold(real, samples, own, self._distances, self._device)
            scores[f"recall{suffix}"] = SetScore(
                float(inside.double().mean()), n, f"of {len(real)} reference images"
            )
        return scores

    def _manifolds(self, prefix: str = "precision") -> dict[str, str]:
        """Name of the metric -> space, for the spaces with neighbourhoods."""
        if self._reference.images is None:
            return {}
        suffixes = {"inception": "", "other": "_features"}
        return {
            f"{prefix}{suffix}": name
            for name, suffix in suffixes.items()
            if name in self._spaces.extractors()
        }

    def _frechet(self, source: ImageSource, space: str, known: Gaussian | None) -> SetScore:
        """Fréchet distance of `source` from the reference, whose statistics may be `known`."""
        found = _statistics(self._rows(space, source))
        if known is None:
            real = _statistics(self._reference_rows(space))
            known, note = Gaussian(real.mean, real.covariance), caveat(found, real)
        else:
            note = caveat(found)
        if known.mean.shape != found.mean.shape:
            raise UserError(
                f"{self._reference.name}: its statistics have {len(known.mean)} features, the network "
                f"{len(found.mean)}; they are of another network"
            )
        value = gaussian_distance(found.mean, found.covariance, known.mean, known.covariance)
        return SetScore(value, found.count, note)

    def _files(self, extractor: FeatureExtractor, source: ImageSource) -> FeatureFiles:
        store = self._reference_store if source is self._reference.images else self._store
        return FeatureFiles(store, extractor, source)

    def _rows(self, space: str, source: ImageSource) -> FeatureRows:
        """Rows of a space: `inception` is the first part of Inception's vector, `spatial` the second."""
        extractor = self._spaces.extractors()["inception" if space == "spatial" else space]
        begin, end = 0, extractor.dim
        if isinstance(extractor, AdmInception):
            begin, end = (extractor.pool_dim, end) if space == "spatial" else (0, extractor.pool_dim)
        return FeatureRows(self._files(extractor, source), begin, end)

    def _reference_rows(self, space: str) -> FeatureRows:
        assert self._reference.images is not None, "checked at the start"
        return self._rows(space, self._reference.images)


def _statistics(rows: FeatureRows) -> FeatureStatistics:
    parts = (part for _, part in blocks(rows))
    return FeatureStatistics.stream(rows.features.fingerprint, parts)
