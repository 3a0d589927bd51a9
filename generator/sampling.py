"""Euler sampling with classifier-free guidance, for text-to-image and for editing.

Shape suffixes: B guidance branches, S samples, P latent tokens of one image (Y * X), C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from data.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.packing import read_captions, read_latents, text_split
from data.shards import ShardDataset
from data.text import TextTokenizer
from engine.config import ConfigError, UserError
from generator.flow import TimeShift, resolve_shift, sampling_times
from generator.model import Generator, normalise, unnormalise
from generator.prefix import PrefixCache, split_prefix

SOURCE_PART = "source.latent"


@dataclass(frozen=True)
class SamplingConfig:
    """How an image is drawn."""

    num_steps: int = 50
    """Euler steps from noise to data; each costs one forward pass of all guidance branches."""
    text_guidance: float = 4.0
    """Scale of the text: 1 = plain conditional, larger follows the text more closely."""
    source_guidance: float = 2.0
    """Scale of the source image when editing: 1 = plain conditional, larger stays closer to the source."""
    time_shift: TimeShift = "auto"
    """Shift of the time grid; "auto" = sqrt(latent values / 4096), as in training."""
    seed: int = 0
    """Seed of the first image; image i of a call uses seed + i unless the call gives seeds."""
    batch_images: int = 64
    """Images denoised together: memory only, the result does not depend on it."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_images < 1:
            raise ConfigError("num_steps and batch_images must be at least 1")


@dataclass(frozen=True)
class Condition:
    """What one image is drawn from."""

    text_ids: tuple[int, ...]
    """Prompt or instruction with <|im_start|> and <|im_end|>."""
    source: Tensor | None = None
    """Latents of the image to edit, float32 [C, Y, X] as the autoencoder gives them (not normalised)."""


@dataclass(frozen=True)
class Branch:
    """One term of the guided velocity: its weight and which conditions it sees."""

    weight: float
    text: bool
    source: bool


def make_condition(text_tokenizer: TextTokenizer, text: str, source: Tensor | None = None) -> Condition:
    """Tokenizes a prompt or instruction. Raises UserError when it is empty."""
    if not text.strip():
        raise UserError("the prompt or instruction is empty; write what the image should show")
    return Condition(tuple(text_split(text, text_tokenizer).ids), source)


def read_conditions(
    dataset: ShardDataset, text_tokenizer: TextTokenizer, num_images: int
) -> tuple[Condition, ...]:
    """The first caption of `num_images` samples, spread evenly over latent shards; edits with their sources.

    For previews and scores on validation data.

    Raises UserError: shards of pixels, or a sample that cannot be read.
    """
    latents = dataset.manifest.latent
    if latents is None:
        raise UserError(f"{dataset.directory}: holds pixels, not latents; run launch/encode_latents.py on it")
    count = min(num_images, len(dataset))
    samples = dataset.read([index * len(dataset) // count for index in range(count)])
    sources: Sequence[Tensor | None] = [None] * count
    if any(SOURCE_PART in sample.parts for sample in samples):
        sources = list(unnormalise(read_latents(samples, (SOURCE_PART,), latents)[:, 0], latents))
    return tuple(
        make_condition(text_tokenizer, read_captions(sample)[0], source)
        for sample, source in zip(samples, sources, strict=True)
    )


def guidance_branches(config: SamplingConfig, *, editing: bool) -> tuple[Branch, ...]:
    """The guided velocity as a weighted sum; branches of weight 0 are left out.

    Text-to-image: v = v_none + s_txt (v_text - v_none) (Ho and Salimans 2022, eq. 6).
    Editing: v = v_none + s_src (v_src - v_none) + s_txt (v_text,src - v_src) (Brooks et al. 2023, eq. 3).
    """
    s_text, s_source = config.text_guidance, config.source_guidance
    branches: tuple[Branch, ...]
    if editing:
        branches = (
            Branch(s_text, text=True, source=True),
            Branch(s_source - s_text, text=False, source=True),
            Branch(1 - s_source, text=False, source=False),
        )
    else:
        branches = (Branch(s_text, text=True, source=False), Branch(1 - s_text, text=False, source=False))
    return tuple(branch for branch in branches if branch.weight != 0)


@torch.no_grad()
def sample_latents(
    model: Generator,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    config: SamplingConfig,
    text_tokenizer: TextTokenizer,
) -> Tensor:
    """Draws one image per condition. Returns float32 [N, C, Y, X] on the CPU, un-normalised: what a decoder
    takes.

    Noise comes from each image's own seed, so an image does not depend on what it is drawn together with (up
    to rounding). All conditions have a source, or none has.
    """
    assert len(conditions) == len(seeds) > 0
    assert len({condition.source is None for condition in conditions}) == 1, "edits and prompts do not mix"
    latents = []
    for start in range(0, len(conditions), config.batch_images):
        part = slice(start, start + config.batch_images)
        latents.append(_sample_batch(model, conditions[part], seeds[part], config, text_tokenizer))
    return unnormalise(torch.cat(latents), model.latents)


def _sample_batch(
    model: Generator,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    config: SamplingConfig,
    text_tokenizer: TextTokenizer,
) -> Tensor:
    """Normalised latents [S, C, Y, X] of one batch."""
    shape = model.latents.shape
    device = model.latent_out.weight.device
    branches = guidance_branches(config, editing=conditions[0].source is not None)
    weights_B = torch.tensor([float(branch.weight) for branch in branches], device=device)
    pack = pack_branches(model, conditions, branches, text_tokenizer)
    prefix, noisy = (part.to(device) for part in split_prefix(pack))
    cache = PrefixCache(model.attention_backend)
    clean_times = torch.zeros(len(prefix.image_noisy), device=device)
    model(prefix, prefix.latents, clean_times, attention=cache.fill(prefix.attention))
    attention = cache.extend(noisy.attention)

    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x_SPC = torch.stack(noise).flatten(2).transpose(1, 2).to(device)
    times = sampling_times(config.num_steps, resolve_shift(config.time_shift, shape))
    for t, t_next in pairwise(times):
        x_GC = x_SPC.flatten(0, 1).repeat(len(branches), 1)
        t_I = torch.full((len(noisy.image_noisy),), t, device=device)
        v_BSPC = model(noisy, x_GC, t_I, attention=attention).view(len(branches), *x_SPC.shape)
        v_SPC = torch.tensordot(weights_B, v_BSPC, dims=1)
        x_SPC = x_SPC + (t_next - t) * v_SPC  # Euler step of d x_t / dt = v
    return x_SPC.transpose(1, 2).reshape(len(seeds), *shape).cpu()


def pack_branches(
    model: Generator,
    conditions: Sequence[Condition],
    branches: Sequence[Branch],
    text_tokenizer: TextTokenizer,
) -> PackedBatch:
    """One pack (on the CPU), branch by branch: [source] [text] [noisy image] with what the branch sees."""
    target = ImageSplit(torch.zeros(model.latents.shape), noisy=True)
    samples: list[list[TextSplit | ImageSplit]] = []
    for branch in branches:
        for condition in conditions:
            splits: list[TextSplit | ImageSplit] = []
            if branch.source and condition.source is not None:
                splits.append(
                    ImageSplit(normalise(condition.source.cpu().float(), model.latents), noisy=False)
                )
            if branch.text:
                splits.append(TextSplit(condition.text_ids))
            samples.append([*splits, target])
    return build_packed_batch(
        samples,
        vision_start_id=text_tokenizer.vision_start_id,
        vision_end_id=text_tokenizer.vision_end_id,
        max_side=model.config.max_side,
        seed=0,
        sample_ids=[str(index) for index in range(len(samples))],
    )
