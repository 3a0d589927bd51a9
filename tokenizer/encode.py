"""Pixel shards -> latent shards: same shard names, keys and json; several ranks; resumable by shard.

Batches are cut inside a shard, in its order, so a shard's bytes do not depend on which rank wrote it, nor on
whether the run was interrupted.

Shapes: B batch, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.images import IMAGE_PARTS, decode_image, fit_image
from data.packing import read_captions
from data.shards import LatentInfo, Sample, ShardDataset, finished_shard, write_manifest, write_shard
from data.text import TextTokenizer, load_text_tokenizer
from engine import files
from engine.config import ConfigError, UserError
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import fingerprint
from tokenizer.moments import Moments

LATENT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENTS_DIRECTORY = "moments"  # below the latent shards: one JSON a shard


@dataclass(frozen=True)
class EncodeConfig:
    """One encoding run."""

    autoencoder: str
    """Directory of an exported or imported autoencoder: RPiAE, RAE or a convolutional VAE."""
    shards: str
    """Directory of finished pixel shards."""
    out: str
    """Directory for the latent shards."""
    text_tokenizer: str
    """Name or directory of the text tokenizer that counts the caption tokens for packing."""
    statistics_from: str | None = None
    """Latent shards whose mean and deviation are taken over: those that the model to fine-tune was trained on.
    None: this data set's own."""
    batch_images: int = 64
    """Images per forward pass. Part of the run's identity: another batch size may round differently."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the stored latents; the encoder runs in fp32."""
    device: str = "cpu"
    """Where the encoder runs, e.g. cpu or cuda."""

    def __post_init__(self) -> None:
        if self.batch_images < 1:
            raise ConfigError(f"batch_images is {self.batch_images}; give at least 1")


def encode_shards(config: EncodeConfig, *, rank: int, world: int, barrier: Callable[[], None]) -> None:
    """Encodes the shards i with i % world == rank; after `barrier`, rank 0 writes the manifest.

    Every image part (png, source.jpg, ...) becomes a latent part (latent, source.latent, ...). A shard that
    an earlier run finished is skipped. Raises UserError: no such autoencoder, shards or text tokenizer;
    shards in `out` made from something else; a sample without image or caption; latents that are constant or
    not finite.
    """
    job = _Job(config)
    entries = job.dataset.manifest.shards
    first = np.cumsum([0, *(entry.num_samples for entry in entries)])
    todo = [i for i in range(rank, len(entries), world) if not job.is_finished(entries[i].name)]
    total, done, start_s = sum(entries[i].num_samples for i in todo), 0, time.monotonic()
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] | None = None
        for i in todo:
            shard = job.encode(entries[i].name, range(int(first[i]), int(first[i + 1])))
            if writing is not None:
                writing.result()  # at most one shard waits in memory while the next is encoded
            writing = writer.submit(job.write, shard)
            done += entries[i].num_samples
            rate = done / (time.monotonic() - start_s)
            print(
                f"rank {rank}: {entries[i].name} encoded, {done}/{total} samples, {rate:.0f} samples/s, "
                f"{(total - done) / rate:.0f} s left",
                flush=True,
            )
        if writing is not None:
            writing.result()
    barrier()
    if rank == 0:
        job.finish([entry.name for entry in entries])
    barrier()


@dataclass(frozen=True)
class _Shard:
    """What is written as one latent shard."""

    name: str
    encoded: list[tuple[Sample, int, int]]  # latent sample, image tokens, text tokens
    moments: Moments


class _Job:
    """The opened inputs of one run."""

    def __init__(self, config: EncodeConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self.dataset = ShardDataset.open(config.shards)
        if self.dataset.manifest.latent is not None:
            raise UserError(f"{config.shards}: holds latents already; give the pixel shards")
        self.text_tokenizer: TextTokenizer = load_text_tokenizer(config.text_tokenizer)
        self.autoencoder_fingerprint = fingerprint(config.autoencoder)
        self.model = load_autoencoder(config.autoencoder).to(config.device)
        self.source = (
            f"{config.dtype} latents of data set {self.dataset.fingerprint}, autoencoder "
            f"{self.autoencoder_fingerprint}, text tokenizer {self.text_tokenizer.fingerprint}, "
            f"batches of {config.batch_images}"
        )

    def is_finished(self, name: str) -> bool:
        """Raises UserError when the shard there was made from something else."""
        return (
            finished_shard(self.out / name, source=self.source) is not None
            and self._moments_path(name).is_file()
        )

    def encode(self, name: str, indices: range) -> _Shard:
        """One latent shard, in memory."""
        moments = Moments(self.model.latent_shape[0])
        return _Shard(name, list(self._encoded(indices, moments)), moments)

    def write(self, shard: _Shard) -> None:
        """Its statistics go first, so that a finished shard always has them."""
        files.write_json(self._moments_path(shard.name), shard.moments.state_dict())
        samples = [sample for sample, _, _ in shard.encoded]
        counts = [
            (num_image_tokens, num_text_tokens) for _, num_image_tokens, num_text_tokens in shard.encoded
        ]
        write_shard(self.out / shard.name, samples, counts, source=self.source)

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
            text_tokenizer_fingerprint=self.text_tokenizer.fingerprint,
        )
        if self.config.statistics_from is not None:
            latent = _with_statistics_of(self.config.statistics_from, latent)
        manifest = write_manifest(self.out, source=self.source, latent=latent)
        assert manifest.num_samples == len(self.dataset), "every sample of the input is in a finished shard"

    def _moments_path(self, name: str) -> Path:
        return self.out / MOMENTS_DIRECTORY / f"{name.removesuffix('.tar')}.json"

    def _encoded(self, indices: range, moments: Moments) -> Iterator[tuple[Sample, int, int]]:
        """(latent sample, image tokens, text tokens) in shard order."""
        images_per_sample = len(_image_parts(self.dataset.read(indices[:1])[0]))
        step = max(1, self.config.batch_images // images_per_sample)
        batches = [indices[i : i + step] for i in range(0, len(indices), step)]
        for samples, pixels in self._read_ahead(batches):
            latents = iter(self._latents(pixels, moments))
            for sample in samples:
                yield self._latent_sample(sample, latents)

    def _read_ahead(self, batches: list[range]) -> Iterator[tuple[list[Sample], Tensor]]:
        """What `_read` gives for each batch, while a thread reads the next."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            pending = reader.submit(self._read, batches[0])
            for batch in batches[1:]:
                ready = pending.result()
                pending = reader.submit(self._read, batch)
                yield ready
            yield pending.result()

    def _read(self, indices: range) -> tuple[list[Sample], Tensor]:
        """Samples, and the pixels of all their images, uint8 [B, 3, H, W]."""
        samples = self.dataset.read(indices)
        pixels = [
            fit_image(decode_image(sample, part), self.model.config.image_px)
            for sample in samples
            for part in _image_parts(sample)
        ]
        return samples, torch.stack(pixels)

    @torch.inference_mode()
    def _latents(self, pixels: Tensor, moments: Moments) -> list[bytes]:
        """Raw little-endian values [C, Y, X] of each image; `moments` take the values as stored."""
        z_BCYX = self.model.encode(pixels.to(self.config.device).float() / 255.0)
        stored = z_BCYX.float().cpu().to(LATENT_DTYPES[self.config.dtype])
        moments.add(stored.double().numpy())
        return [latent.contiguous().view(torch.uint8).numpy().tobytes() for latent in stored]

    def _latent_sample(self, sample: Sample, latents: Iterator[bytes]) -> tuple[Sample, int, int]:
        parts = {part: payload for part, payload in sample.parts.items() if not _is_image(part)}
        images = _image_parts(sample)
        for part in images:
            parts[".".join([*part.split(".")[:-1], "latent"])] = next(latents)
        num_image_tokens = len(images) * math.prod(self.model.latent_shape[1:])
        longest = max(len(self.text_tokenizer.encode(caption)) for caption in read_captions(sample))
        return Sample(sample.key, parts), num_image_tokens, longest


def _with_statistics_of(directory: str, latent: LatentInfo) -> LatentInfo:
    """`latent` with the mean and deviation of another data set of the same autoencoder."""
    other = ShardDataset.open(directory).manifest.latent
    if other is None or other.tokenizer_fingerprint != latent.tokenizer_fingerprint:
        raise UserError(
            f"{directory}: not latents of this autoencoder; statistics_from needs such a data set"
        )
    return dataclasses.replace(latent, mean=other.mean, std=other.std)


def _image_parts(sample: Sample) -> list[str]:
    """Names of the sample's images, sorted: ["png"], or ["source.png", "target.png"]."""
    parts = [part for part in sorted(sample.parts) if _is_image(part)]
    if not parts:
        raise UserError(f"{sample.where}: has no image part ({', '.join(IMAGE_PARTS)})")
    return parts


def _is_image(part: str) -> bool:
    return part.split(".")[-1] in IMAGE_PARTS
