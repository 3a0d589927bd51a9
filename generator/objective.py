"""Flow matching as an objective of the training loop, for text-to-image and for editing.

Shape suffixes: T latent tokens, I images, C latent channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from base.config import UserError, to_dict
from base.files import digest, sha256
from base.objective import HISTORY_WINDOWS, LossOutput, Term, WithoutAdversary
from data.packs.packed_batch import PackedBatch
from data.samples.text import TextTokenizer
from data.shards import LatentInfo
from generator.attention import choose_backend
from generator.config import FlowConfig, GeneratorConfig
from generator.flow import draw_times, interpolate, pack_generator, resolve_shift, velocity_target
from generator.model import WEIGHTS_NAME, Generator
from generator.sampling import Condition, sample_latents
from generator.sampling_config import SamplingConfig
from generator.sizing import PackSize, training_flops

ENOUGH_SAMPLES = 1000
"""Samples without a text marked for a loss, after which the data are taken to have none."""
Decode = Callable[[Tensor], Tensor]
"""Raw latents float32 [N, C, Y, X] -> pixels_01 [N, 3, H, W]."""


@dataclass(frozen=True)
class Preview:
    """What `samples` draws: a few fixed conditions, image i with seed + i."""

    conditions: tuple[Condition, ...]
    """Validation prompts, or edits with their sources."""
    sampling: SamplingConfig
    """Steps, guidance and seed of the drawing."""
    decode: Decode
    """The autoencoder's decoder."""


class FlowObjective(WithoutAdversary):
    """Mean squared error on the velocity of noisy latent tokens. Implements base.objective.Objective."""

    def __init__(
        self,
        name: Literal["t2i", "edit"],
        model: Generator,
        config: FlowConfig,
        text_tokenizer: TextTokenizer,
        *,
        start: str,
        preview: Preview | None = None,
    ) -> None:
        self.name = name
        self.model: Generator = model
        self._config = config
        self._shift = resolve_shift(config.time_shift, model.latents.shape)
        self.text_tokenizer = text_tokenizer
        self._start = start
        self._preview = preview
        self._awaits_text = config.text_loss_weight > 0
        model.attention_backend = config.attention_backend
        model.backbone.activation_checkpointing = config.activation_checkpointing
        if config.text_loss_weight and not model.config.text_output:
            raise UserError("flow.text_loss_weight needs generator.text_output: true")
        if model.config.text_output and not config.text_loss_weight:
            raise UserError(
                "generator.text_output is true, but flow.text_loss_weight is 0: set one of them right"
            )
        if config.compile:
            model.compile_layers()

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)

    def count(self, batch: PackedBatch) -> int:
        """Number of noisy latent tokens."""
        return batch.num_loss_tokens

    def further_counts(self, batch: PackedBatch) -> Mapping[str, int]:
        """Number of predicted text tokens, if there is a text loss."""
        return {"text": len(batch.text_loss_ids)} if self._config.text_loss_weight else {}

    def loss(self, batch: PackedBatch, step: int) -> LossOutput:
        """Sum over noisy tokens of mean_c (v - (eps - z))^2; t per noisy image and eps are drawn from the batch's seed.
        A text loss adds the term `text`, the sum of the cross entropies."""
        device, num_noisy = batch.latents.device, batch.num_loss_tokens
        num_clean = len(batch.latents) - num_noisy
        num_targets = batch.num_targets
        generator = pack_generator(batch.seed, device)
        t_I = torch.zeros(len(batch.image_noisy), device=device)  # clean images enter at t = 0, without noise
        t_I[len(t_I) - num_targets :] = draw_times(num_targets, self._shift, generator)
        noise_TC = torch.randn((num_noisy, batch.latents.shape[1]), generator=generator, device=device)
        z_TC, times_T = batch.latents[num_clean:], t_I[batch.image_index[num_clean:]]
        x_GC = torch.cat([batch.latents[:num_clean], interpolate(z_TC, noise_TC, times_T[:, None])])
        further: dict[str, Term] = {}
        if self._config.text_loss_weight:
            velocity_TC, text_loss = self.model.forward_with_text(batch, x_GC, t_I)
            further["text"] = Term(text_loss, self._config.text_loss_weight)
        else:
            velocity_TC = self.model(batch, x_GC, t_I)
        loss_sum = (velocity_TC - velocity_target(z_TC, noise_TC)).square().mean(1).sum()
        flops = training_flops(PackSize.of(batch), self.model.config, self.model.latents.shape[0])
        return LossOutput(loss_sum, {"loss": loss_sum.detach()}, further=further, flops=flops)

    @torch.no_grad()
    def samples(self) -> npt.NDArray[np.uint8] | None:
        """The preview's images in one row; for edits the sources in a row above. uint8 [H, W, 3]."""
        if self._preview is None:
            return None
        conditions, sampling = self._preview.conditions, self._preview.sampling
        seeds = [sampling.seed + index for index in range(len(conditions))]
        latents = sample_latents(self.model, conditions, seeds, sampling, self.text_tokenizer)
        sources = [condition.source for condition in conditions if condition.source is not None]
        rows = [torch.stack(sources).float(), latents] if sources else [latents]
        return tile([self._preview.decode(row) for row in rows])

    def export(self, directory: Path) -> None:
        """Writes the generator: model.safetensors and config.json."""
        self.model.save(directory)

    def alarms(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """Alarms once if the text loss met no text in ENOUGH_SAMPLES samples, or in HISTORY_WINDOWS log windows."""
        num_samples = sum(window.get("samples", 0.0) for window in history)
        if any("text_loss" in window for window in history):
            self._awaits_text = False
        is_enough = num_samples >= ENOUGH_SAMPLES or len(history) == HISTORY_WINDOWS
        if not (self._awaits_text and is_enough):
            return []
        self._awaits_text = False
        return [
            f"flow.text_loss_weight is {self._config.text_loss_weight:g}, but none of {num_samples:,.0f} samples marks "
            'a text for it ("loss" in json\'s "splits", data/samples/layouts.py); mark some, or set it to 0 and '
            "generator.text_output to false"
        ]

    def describe(self) -> list[str]:
        """Size, weights' origin, time shift, attention kernel. Raises UserError: a forced kernel cannot run here."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in self.model.parameters()) - trained
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kernel = choose_backend(device, torch.bfloat16, self._config.attention_backend)
        return [
            f"{trained:,} parameters are trained, {frozen:,} are not (only a text loss would reach them)",
            f"start: {self._config.init_from or self.model.config.init}; time shift {self._shift:.3g}",
            f"attention: {kernel} on {device.type} in bf16 (sdpa in fp32)",
        ]

    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of the latents' autoencoder and text tokenizer, and origin of the weights."""
        return {
            "tokenizer": self.model.latents.tokenizer_fingerprint,
            "text_tokenizer": self.model.latents.text_tokenizer_fingerprint,
            "start": self._start,
        }


def build_objective(
    name: Literal["t2i", "edit"],
    generator: GeneratorConfig,
    flow: FlowConfig,
    latents: LatentInfo,
    text_tokenizer: TextTokenizer,
    *,
    seed: int,
    preview: Preview | None = None,
) -> FlowObjective:
    """Builds the objective of train_t2i or train_edit, on the CPU. `latents`: from the training shards' manifest.

    Weights are new (random from `seed`, or Qwen's) or those of `flow.init_from`, which then train on.
    Raises UserError: another text tokenizer, other latents or other statistics than the model's.
    """
    if text_tokenizer.fingerprint != latents.text_tokenizer_fingerprint:
        raise UserError(
            "the shards' captions were counted by another text tokenizer; encode the shards with this one"
        )
    if text_tokenizer.vocab_size > generator.backbone.vocab_size:
        raise UserError(
            f"generator.backbone.vocab_size {generator.backbone.vocab_size} is less than the text tokenizer's "
            f"{text_tokenizer.vocab_size}; raise it"
        )
    if flow.init_from is None:
        model = Generator.create(generator, latents, seed)
        start = digest({"generator": to_dict(generator), "seed": seed})
    else:
        model = Generator.load(flow.init_from)
        check_latents(latents, model.latents, where=flow.init_from)
        model.set_text_output(generator.text_output)
        if differences := _differences(model.config, generator):
            raise UserError(
                f"{flow.init_from}: its shape differs from this run's generator config "
                f"({'; '.join(differences)}); make them equal"
            )
        start = sha256(Path(flow.init_from) / WEIGHTS_NAME)
    return FlowObjective(name, model, flow, text_tokenizer, start=start, preview=preview)


def _differences(found: GeneratorConfig, wanted: GeneratorConfig) -> list[str]:
    """Names of the fields whose values differ, except `init`."""
    differences = []
    for part, ours, runs in (("backbone.", found.backbone, wanted.backbone), ("", found, wanted)):
        for field in dataclasses.fields(ours):
            value, asked = getattr(ours, field.name), getattr(runs, field.name)
            if value != asked and field.name not in ("backbone", "init"):
                differences.append(f"generator.{part}{field.name}: {value} there, {asked} here")
    return differences


def check_latents(found: LatentInfo, expected: LatentInfo, where: str) -> None:
    """Raises UserError in one line: latents that the weights in `where` were not trained on.

    Tokenizers, shape and statistics must be equal: with another mean and deviation an image would become another
    input.
    """
    for field, meaning in (
        ("shape", "latent shape"),
        ("tokenizer_fingerprint", "autoencoder"),
        ("text_tokenizer_fingerprint", "text tokenizer"),
    ):
        if getattr(found, field) != getattr(expected, field):
            raise UserError(
                f"{where}: trained with {meaning} {_short(getattr(expected, field))}, the data has "
                f"{_short(getattr(found, field))}; encode the data again or start from other weights"
            )
    if (found.mean, found.std) != (expected.mean, expected.std):
        raise UserError(
            f"{where}: trained under other latent statistics than the data's; encode the data with "
            "statistics_from set to the latents these weights were trained on"
        )


def tile(rows: Sequence[Tensor]) -> npt.NDArray[np.uint8]:
    """Rows of images, each pixels_01 [N, 3, H, W], as one uint8 picture [rows * H, N * W, 3]."""
    strips = [row.detach().float().cpu().permute(2, 0, 3, 1).flatten(1, 2) for row in rows]  # [H, N * W, 3]
    picture: npt.NDArray[np.uint8] = (torch.cat(strips).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return picture


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
