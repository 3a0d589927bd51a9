"""Encodes pixel shards into latent shards: equal shard names, keys and json; several ranks; resumable by shard.

Batches are cut inside a shard, in its order, so a shard's bytes do not depend on which rank wrote it, nor on
whether the run was interrupted. Threads decode the next batch and write the last one while the encoder runs.

Shapes: I images of a batch, K crops, V views, M moments (mean, log variance), C latent channels, Y X token grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base import files
from base.config import UserError
from base.progress import ProgressLine
from data.samples.images import image_parts
from data.samples.latents import TORCH_DTYPES
from data.samples.text import TextTokenizer, load_text_tokenizer
from data.shards import (
    LatentInfo,
    OpenShard,
    Sample,
    ShardDataset,
    check_shards,
    claim_shards,
    finished_shard,
    write_manifest,
)
from tokenizer.autoencoders import load_autoencoder
from tokenizer.config import EncodeConfig
from tokenizer.export import fingerprint
from tokenizer.latent_sample import latent_sample
from tokenizer.moments import Moments
from tokenizer.views import Views, ahead, read_crops
from tokenizer.weights import usable

VIEWS_AT_ONCE = 8  # views whose moments are computed together; their fp64 values fit in the cache
COMMAND = "encode_latents"
MOMENTS_DIRECTORY = "moments"  # below the latent shards: one JSON file for each shard


def encode_shards(config: EncodeConfig, *, rank: int, world: int, barrier: Callable[[], None]) -> None:
    """Encodes the shards i with i % world == rank; after `barrier`, rank 0 writes the manifest.

    Every image part (png, source.jpg, ...) becomes a latent part (latent, source.latent, ...). A shard that an earlier
    run finished is skipped. Raises UserError: no such autoencoder, shards or text tokenizer; log variances asked of an
    autoencoder that has none; shards in `out` made from other inputs; a sample without image, or with neither caption
    nor class; latents that are constant, not finite or too large for the dtype.
    """
    check_out(config)
    job = _Job(config)
    claim_shards(job.out, COMMAND)
    entries = job.dataset.manifest.shards
    first = np.cumsum([0, *(entry.num_samples for entry in entries)])
    todo = [i for i in range(rank, len(entries), world) if not job.is_finished(entries[i].name)]
    total, done = sum(entries[i].num_samples for i in todo), 0
    progress = ProgressLine(f"rank {rank}: {len(todo)} shards to encode", "samples")
    with ThreadPoolExecutor(max_workers=1) as closer:
        closing: Future[None] | None = None
        for i in todo:
            close = job.write(entries[i].name, range(int(first[i]), int(first[i + 1])))
            if closing is not None:
                closing.result()
            closing = closer.submit(
                close
            )  # fsync and hashes take a while; the next shard is encoded meanwhile
            done += entries[i].num_samples
            progress.show(done, done / total)
        if closing is not None:
            closing.result()
    barrier()
    if rank == 0:
        job.finish([entry.name for entry in entries])
    barrier()


def check_out(config: EncodeConfig) -> None:
    """Raises UserError when `out` is the input folder or holds shards made from other inputs. Writes nothing."""
    if Path(config.out).resolve() == Path(config.shards).resolve():
        raise UserError(f"out {config.out}: is the input, shards; give another folder")
    check_shards(Path(config.out), COMMAND)


class _Job:
    """The opened inputs of one run."""

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.dataset = ShardDataset.open(config.shards, config.storage)
        if self.dataset.manifest.latent is not None:
            raise UserError(f"{config.shards}: holds latents already; give the pixel shards")
        self.text_tokenizer: TextTokenizer | None = None
        if config.text_tokenizer is not None:
            self.text_tokenizer = load_text_tokenizer(config.text_tokenizer)
        self.text_fingerprint = "" if self.text_tokenizer is None else self.text_tokenizer.fingerprint
        self.autoencoder_fingerprint = fingerprint(config.autoencoder)
        self.model = load_autoencoder(config.autoencoder).to(usable(config.device))
        if config.logvar and not self.model.has_logvar:
            raise UserError(f"{config.autoencoder}: has no log variance (an RAE has none); set logvar: false")
        image_px = self.model.config.image_px
        resize_px = image_px if config.resize_px is None else config.resize_px
        self.views = Views(image_px, resize_px, config.num_crops, config.horizontal_flip, config.seed)
        variances = " with log variances" if config.logvar else ""
        self.source = (
            f"{config.dtype} latents{variances} of data set {self.dataset.fingerprint}, {self.views}, autoencoder "
            f"{self.autoencoder_fingerprint}, text tokenizer {self.text_fingerprint or 'none'}, "
            f"batches of {config.batch_images}"
        )

    def is_finished(self, name: str) -> bool:
        """Whether the shard is complete. Raises UserError: the shard there was made from other inputs."""
        return (
            finished_shard(self.out / name, source=self.source) is not None
            and self._moments_path(name).is_file()
        )

    def write(self, name: str, indices: range) -> Callable[[], None]:
        """Encodes one shard into a file under a temporary name; the function returned makes the name final."""
        self.out.mkdir(parents=True, exist_ok=True)
        shard, moments = OpenShard(self.out / name), Moments(self.model.latent_shape[0])
        try:
            for samples, latents in ahead(self._encode(indices)):
                images = iter(latents)
                for sample in samples:
                    shard.add(*latent_sample(sample, images, self.text_tokenizer))
                means = latents[:, :, 0].flatten(0, 1)  # in the stored dtype
                for few in torch.split(means, VIEWS_AT_ONCE):
                    moments.add(few.double().numpy())
        except BaseException:
            shard.drop()
            raise

        def close() -> None:
            # The statistics go first, so that a finished shard always has them.
            files.write_json(self._moments_path(name), moments.state_dict())
            shard.close(self.source, rejected=())

        return close

    def finish(self, names: list[str]) -> None:
        """Merges the statistics in shard order and writes the manifest."""
        moments = Moments(self.model.latent_shape[0])
        for name in names:
            moments.merge(Moments.from_state_dict(files.read_json(self._moments_path(name))))
        std = moments.std
        unusable = np.flatnonzero(~(np.isfinite(std) & (std > 0))).tolist()
        if unusable:
            raise UserError(
                f"{self.config.autoencoder}: latent channels {unusable} are constant or not finite over "
                f"{self.config.shards}; check the autoencoder's training"
            )
        latent = LatentInfo(
            dtype=self.config.dtype,
            shape=self.model.latent_shape,
            mean=tuple(moments.mean.tolist()),
            std=tuple(std.tolist()),
            tokenizer_fingerprint=self.autoencoder_fingerprint,
            text_tokenizer_fingerprint=self.text_fingerprint,
            num_views=self.views.num_views,
            has_logvar=self.config.logvar,
        )
        if self.config.statistics_from is not None:
            latent = _with_statistics_of(self.config.statistics_from, latent)
        manifest = write_manifest(self.out, names, source=self.source, latent=latent)
        assert manifest.num_samples == len(self.dataset), "every sample of the input is in a finished shard"

    def _moments_path(self, name: str) -> Path:
        return self.out / MOMENTS_DIRECTORY / f"{name.removesuffix('.tar')}.json"

    def _encode(self, indices: range) -> Iterator[tuple[list[Sample], Tensor]]:
        """Yields samples and the latents [I, V, M, C, Y, X] of all their images, in the stored dtype, on the CPU."""
        images_per_sample = len(image_parts(self.dataset.read(indices[:1])[0].parts))
        step = max(1, self.config.batch_images // max(1, images_per_sample * self.views.num_views))
        batches = [indices[i : i + step] for i in range(0, len(indices), step)]
        for samples, crops in ahead(
            read_crops(self.dataset, batches, self.views, self.config.num_decode_threads)
        ):
            yield samples, self._latents(crops)

    @torch.inference_mode()
    def _latents(self, crops: Tensor) -> Tensor:
        """uint8 [I, K, 3, H, W] -> [I, V, M, C, Y, X]"""
        views = self.views.with_flips(crops.to(self.config.device))
        pixels_01 = views.flatten(0, 1).float() / 255
        if self.config.logvar:
            moments = torch.stack(self.model.encode_moments(pixels_01), dim=1)
        else:
            moments = self.model.encode(pixels_01)[:, None]
        stored = moments.float().to(TORCH_DTYPES[self.config.dtype]).cpu()
        return stored.view(*views.shape[:2], *stored.shape[1:])


def _with_statistics_of(directory: str, latent: LatentInfo) -> LatentInfo:
    """`latent` with the mean and deviation of another data set of the same autoencoder."""
    other = ShardDataset.open(directory).manifest.latent
    if other is None or other.tokenizer_fingerprint != latent.tokenizer_fingerprint:
        raise UserError(
            f"{directory}: not latents of this autoencoder; statistics_from needs such a data set"
        )
    return dataclasses.replace(latent, mean=other.mean, std=other.std)
