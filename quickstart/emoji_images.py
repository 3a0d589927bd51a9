"""Image sets of the emoji data for the suites, made from shards and trained models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.image_set import Item, write_image, write_manifest
from data.samples.captions import read_captions
from data.samples.images import decode_image, fit_image
from data.shards import Sample, ShardDataset
from evaluation.metrics.reconstruction import to_uint8
from generator.pipeline import Pipeline
from generator.sampling_config import SamplingConfig
from tokenizer.export import ImageAutoencoder


def read_samples(shards: str | Path, num_samples: int) -> list[Sample]:
    """The first samples of a data set."""
    dataset = ShardDataset.open(shards)
    return dataset.read(range(min(num_samples, len(dataset))))


def real_renders(samples: Sequence[Sample], out: Path, image_px: int) -> None:
    """Writes the samples' own images as `result`: the judge's scores on them are its accuracy."""
    _write(out, samples, {"result": _pixels(samples, "png", image_px)})


def reconstructions(samples: Sequence[Sample], autoencoder: ImageAutoencoder, out: Path) -> None:
    """Writes `original`, and `result` = decode(encode(original)) on 8 bits (protocol: truncated)."""
    originals = _pixels(samples, "png", autoencoder.config.image_px)
    with torch.no_grad():
        decoded = [
            autoencoder.decode(autoencoder.encode(part.float() / 255)) for part in torch.split(originals, 64)
        ]
    _write(out, samples, {"original": originals, "result": to_uint8(torch.cat(decoded))})


def drawings(samples: Sequence[Sample], pipeline: Pipeline, sampling: SamplingConfig, out: Path) -> None:
    """Draws `result` from each sample's first caption; image i with seed + i."""
    captions = [read_captions(sample)[0] for sample in samples]
    results = _stack(pipeline.generate(captions, sampling=sampling))
    _write(out, samples, {"result": results}, [{"caption": caption} for caption in captions])


def edits(samples: Sequence[Sample], pipeline: Pipeline, sampling: SamplingConfig, out: Path) -> None:
    """Writes `source`, `target` (ground truth) and `result`: the source edited by the sample's first instruction."""
    image_px = pipeline.autoencoder.config.image_px
    sources, targets = (_pixels(samples, part, image_px) for part in ("source.png", "target.png"))
    instructions = [read_captions(sample)[0] for sample in samples]
    images = [Image.fromarray(source.permute(1, 2, 0).numpy()) for source in sources]
    results = _stack(pipeline.edit(images, instructions, sampling=sampling))
    extra = [{"instruction": instruction} for instruction in instructions]
    _write(out, samples, {"source": sources, "target": targets, "result": results}, extra)


def _pixels(samples: Sequence[Sample], part: str, image_px: int) -> Tensor:
    """The samples' images, uint8 [N, 3, H, W]."""
    return torch.stack([fit_image(decode_image(sample, part), image_px) for sample in samples])


def _stack(images: Sequence[Image.Image]) -> Tensor:
    """The images as uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def _write(
    out: Path,
    samples: Sequence[Sample],
    images: Mapping[str, Tensor],
    extra: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    items = []
    for index, sample in enumerate(samples):
        names = {role: f"{sample.key}.{role}.png" for role in images}
        for role, name in names.items():
            write_image(out / name, images[role][index])
        meta = {**json.loads(sample.parts["json"]), **(extra[index] if extra else {})}
        items.append(Item(sample.key, names, meta))
    write_manifest(out, items)
