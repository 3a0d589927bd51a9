"""Latent parts of samples -> normalised tensors of one view: its mean or a random draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from base import files
from base.config import UserError
from data.shards import LatentInfo, Sample, ShardDataset

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_latent_shards(dataset: ShardDataset, expected: LatentInfo) -> None:
    """Raises UserError: shards of pixels, or latents that are not `expected`."""
    latent, where = dataset.manifest.latent, dataset.directory
    if latent is None:
        raise UserError(f"{where}: holds pixels, not latents; run launch/encode_latents.py on it")
    if latent != expected:
        raise UserError(
            f"{where}: latents differ from this run's (tokenizer, shape or statistics); encode again"
        )


def check_has_variance(latent: LatentInfo) -> None:
    """Checks that latents can be drawn. Raises UserError: they were stored without a variance."""
    if not latent.has_logvar:
        raise UserError(
            "packing.sample_latents: these latents were stored without a variance; encode with logvar: true"
        )


def latent_seed(seed: int, epoch: int, key: str) -> int:
    """Seed for drawing a sample's latents in one epoch, 60 bits; `seed`: the run's seed."""
    return int(files.digest(["latent", seed, epoch, key])[:15], 16)


def read_latents(
    samples: Sequence[Sample],
    parts: Sequence[str],
    latent: LatentInfo,
    *,
    views: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Normalised latents, (z - mean) / std, as float32 [len(samples), len(parts), C, Y, X].

    `views`: the view of each sample, used for all its parts; None: the first view, the centre crop. `seeds`: draws z =
    mu + exp(logvar / 2) eps, eps ~ N(0, I), with each sample's seed; None: z = mu. `mean` and `std` are those of mu in
    both cases, so the standard deviation of drawn latents is a little above 1. Raises UserError naming the sample: a
    part is missing or of another size.
    """
    num_moments = 1 if seeds is None else 2
    assert latent.has_logvar or seeds is None
    view_bytes = latent.num_bytes // latent.num_views
    used_bytes = view_bytes if seeds is not None or not latent.has_logvar else view_bytes // 2
    wanted: list[memoryview] = []
    for sample, view in zip(samples, views or [0] * len(samples), strict=True):
        for part in parts:
            payload = sample.parts.get(part, b"")
            if len(payload) != latent.num_bytes:
                raise UserError(
                    f"{sample.where}: no part '{part}' of {latent.num_bytes} bytes; encode these shards again"
                )
            wanted.append(memoryview(payload)[view * view_bytes :][:used_bytes])
    channels, height, width = latent.shape
    stored = torch.frombuffer(bytearray().join(wanted), dtype=TORCH_DTYPES[latent.dtype])
    stored = stored.view(len(samples), len(parts), num_moments, channels, height * width)
    # Channels last in memory, as packs store tokens; transposed before float(), while it is small.
    moments = stored.transpose(-1, -2).contiguous().float()
    z = moments[:, :, 0]
    if seeds is not None:
        shape = (len(parts), height * width, channels)
        eps = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        z = z + torch.exp(0.5 * moments[:, :, 1]) * torch.stack(eps)
    z = z.sub_(torch.tensor(latent.mean)).div_(torch.tensor(latent.std))
    return z.view(len(samples), len(parts), height, width, channels).permute(0, 1, 4, 2, 3)
