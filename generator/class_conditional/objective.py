"""Flow matching on class labels as an objective of the training loop.

Shape suffixes: B images, C latent channels, Y X latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from base.config import UserError, to_dict
from base.files import digest, sha256
from base.objective import LossOutput, WithoutAdversary
from data.packs.class_batch import ClassBatch
from data.shards import LatentInfo
from generator.class_conditional.alignment import AlignedGenerator
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig, DitConfig
from generator.class_conditional.model import (
    WEIGHTS_NAME,
    ClassGenerator,
    create_generator,
    load_generator,
)
from generator.class_conditional.sampling import sample_class_latents
from generator.class_conditional.sizing import training_flops
from generator.flow import draw_times, interpolate, pack_generator, resolve_shift, velocity_target
from generator.objective import Decode, check_latents, tile

PREVIEW_COLUMNS = 8


@dataclass(frozen=True)
class ClassPreview:
    """What `samples` draws: one image of each label, image i with seed + i."""

    labels: tuple[int, ...]
    sampling: ClassSamplingConfig
    decode: Decode
    """The autoencoder's decoder."""


class ClassObjective(WithoutAdversary):
    """Mean squared error on the velocity of latents. Implements base.objective.Objective."""

    name = "class"

    def __init__(
        self,
        model: ClassGenerator,
        config: ClassFlowConfig,
        *,
        start: str,
        seed: int = 0,
        preview: ClassPreview | None = None,
    ) -> None:
        """`seed`: seed of the alignment's projection."""
        self.generator = model
        self._aligned: AlignedGenerator | None = None
        if config.align is not None:
            self._aligned = AlignedGenerator(model, config.align, seed)
        self.model: nn.Module = self._aligned or model
        self._config = config
        self._shift = resolve_shift(config.time_shift, model.latents.shape)
        self._start = start
        self._preview = preview
        model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            model.compile_layers()

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)

    def count(self, batch: ClassBatch) -> int:
        """Number of images."""
        return len(batch.sample_ids)

    def loss(self, batch: ClassBatch, step: int) -> LossOutput:
        """Sum over images of mean_cyx (v - (eps - z))^2; t and eps are drawn from the batch's seed.

        `align` adds its weight times the negative cosine; the log shows the mean cosine as `alignment`.
        """
        z_BCYX = batch.latents
        generator = pack_generator(batch.seed, z_BCYX.device)
        t_B = draw_times(len(z_BCYX), self._shift, generator)
        noise_BCYX = torch.randn(z_BCYX.shape, generator=generator, device=z_BCYX.device)
        x_BCYX = interpolate(z_BCYX, noise_BCYX, t_B[:, None, None, None])
        layer = 0 if self._aligned is None else self._aligned.config.layer
        velocity, tokens_BTD = self.generator.forward_with_tokens(x_BCYX, t_B, batch.labels, layer)
        loss_sum = (velocity - velocity_target(z_BCYX, noise_BCYX)).square().mean((1, 2, 3)).sum()
        metrics = {"loss": loss_sum.detach()}
        if self._aligned is not None:
            alignment = self._aligned.alignment_loss(tokens_BTD, z_BCYX)
            metrics["alignment"] = -alignment.detach()
            loss_sum = loss_sum + self._aligned.config.weight * alignment
        shape, align = self.generator.latents.shape, self._config.align
        flops = training_flops(self.generator.config, shape, len(z_BCYX), align)
        return LossOutput(loss_sum, metrics, flops=flops)

    @torch.no_grad()
    def samples(self) -> npt.NDArray[np.uint8] | None:
        """The preview's images in rows of at most 8, the last row filled up with white. uint8 [H, W, 3]."""
        if self._preview is None:
            return None
        labels, sampling = self._preview.labels, self._preview.sampling
        seeds = [sampling.seed + index for index in range(len(labels))]
        pixels = self._preview.decode(sample_class_latents(self.generator, labels, seeds, sampling))
        columns = min(PREVIEW_COLUMNS, len(labels))
        missing = -len(labels) % columns
        return tile(torch.split(F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing), value=1.0), columns))

    def export(self, directory: Path) -> None:
        """Writes the generator: model.safetensors and config.json."""
        self.generator.save(directory)

    def describe(self) -> list[str]:
        """Size of the generator, origin of its weights, time shift."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        fixed = sum(p.numel() for p in self.model.parameters()) - trained
        return [
            f"{trained:,} parameters are trained, {fixed:,} are fixed (positions, frequencies of time)",
            f"start: {self._config.init_from or 'random'}; time shift {self._shift:.3g}",
        ]

    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprint of the latents' autoencoder, and origin of the weights."""
        return {"tokenizer": self.generator.latents.tokenizer_fingerprint, "start": self._start}


def build_class_objective(
    generator: DitConfig,
    flow: ClassFlowConfig,
    latents: LatentInfo,
    *,
    seed: int,
    preview: ClassPreview | None = None,
) -> ClassObjective:
    """Builds train_class's objective on the CPU. `latents`: from the training shards' manifest.

    Raises UserError: initial weights of another shape, or trained on other latents or statistics.
    """
    if flow.init_from is None:
        model = create_generator(generator, latents, seed)
        start = digest({"generator": to_dict(generator), "seed": seed})
    else:
        model = load_generator(flow.init_from)
        check_latents(latents, model.latents, where=flow.init_from)
        if model.config != generator:
            raise UserError(
                f"{flow.init_from}: its shape differs from this run's generator config; make them equal"
            )
        start = sha256(Path(flow.init_from) / WEIGHTS_NAME)
    return ClassObjective(model, flow, start=start, seed=seed, preview=preview)


def spread_labels(num_classes: int, num_images: int) -> tuple[int, ...]:
    """`num_images` labels, spread evenly over the classes."""
    return tuple(math.floor(index * num_classes / num_images) for index in range(num_images))
