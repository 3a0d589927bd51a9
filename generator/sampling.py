"""Drawing latents: a solver along the guided velocity, for text-to-image and for editing.

Shape suffixes: B guidance branches, S samples, P latent tokens of one image (Y * X), C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from base.config import UserError
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.packs.packing import text_split
from data.packs.transfer import to_device
from data.samples.captions import read_captions
from data.samples.images import part_name
from data.samples.latents import read_latents
from data.samples.layouts import LATENT_SUFFIX, image_roles, of_kind
from data.samples.text import TextTokenizer
from data.shards import ShardDataset
from generator.attention import JointAttention
from generator.cuda_graphs import Graphed
from generator.flow import draw_noise, resolve_shift, sampling_times
from generator.guidance import Branch, branch_weights, guide
from generator.model import Generator, normalise, unnormalise
from generator.prefix import PrefixCache, split_prefix
from generator.sampling_config import GuidanceConfig, SamplingConfig
from generator.solvers import integrate


@dataclass(frozen=True)
class Condition:
    """What one image is drawn from: a text, and the images to edit."""

    text_ids: tuple[int, ...]
    """Prompt or instruction with <|im_start|> and <|im_end|>."""
    sources: tuple[Tensor, ...] = ()
    """Latents of the images to edit, each float32 [C, Y, X] as the autoencoder gives them (not normalised)."""

    @property
    def source(self) -> Tensor | None:
        """The first source, which a preview shows; None without sources."""
        return self.sources[0] if self.sources else None


def make_condition(text_tokenizer: TextTokenizer, text: str, sources: Sequence[Tensor] = ()) -> Condition:
    """Tokenizes a prompt or instruction. Raises UserError when it is empty."""
    if not text.strip():
        raise UserError("the prompt or instruction is empty; write what the image should show")
    return Condition(tuple(text_split(text, text_tokenizer).ids), tuple(sources))


def read_conditions(
    dataset: ShardDataset, text_tokenizer: TextTokenizer, num_images: int
) -> tuple[Condition, ...]:
    """The first caption of `num_images` samples, spread evenly over latent shards; edits with their sources.

    For previews and scores on validation data. Raises UserError: shards of pixels, or a sample that cannot be read.
    """
    latents = dataset.manifest.latent
    if latents is None:
        raise UserError(f"{dataset.directory}: holds pixels, not latents; run launch/encode_latents.py on it")
    count = min(num_images, len(dataset))
    conditions = []
    for sample in dataset.read([index * len(dataset) // count for index in range(count)]):
        names = [part_name(role, LATENT_SUFFIX) for role in of_kind(image_roles(sample.parts), "source")]
        sources = unnormalise(read_latents([sample], names, latents)[0], latents) if names else ()
        conditions.append(make_condition(text_tokenizer, read_captions(sample)[0], tuple(sources)))
    return tuple(conditions)


@torch.no_grad()
def sample_latents(
    model: Generator,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    config: SamplingConfig,
    text_tokenizer: TextTokenizer,
) -> Tensor:
    """Draws one image per condition: float32 [N, C, Y, X] on the CPU, un-normalised, as a decoder takes it.

    Noise comes from each image's own seed, so up to rounding an image does not depend on the others of its batch.
    Prompts and edits, with any number of sources, may be mixed.
    """
    assert len(conditions) == len(seeds) > 0
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
    times = sampling_times(config.num_steps, resolve_shift(config.time_shift, shape))
    velocity = GuidedVelocity(model, conditions, times[:-1], config, text_tokenizer)
    noise_SPC = draw_noise(shape, seeds).flatten(2).transpose(1, 2)
    noise_SPC = to_device(noise_SPC, model.latent_out.weight.device)
    x_SPC = integrate(velocity, noise_SPC, times, config.solver)
    return x_SPC.transpose(1, 2).reshape(len(seeds), *shape).cpu()


class GuidedVelocity:
    """The velocity of a batch of images under guidance: a `Velocity` of generator/solvers.py.

    The constructor computes the prefix of all branches (texts, sources) once. A branch that sees less of the prefix has
    the keys of its part. A branch that is not needed at a time is not computed.
    """

    def __init__(
        self,
        model: Generator,
        conditions: Sequence[Condition],
        times: Sequence[float],
        config: GuidanceConfig,
        text_tokenizer: TextTokenizer,
    ) -> None:
        """`times`: every time at which the velocity will be asked for."""
        self._config = config
        self._editing = any(condition.sources for condition in conditions)
        device = model.latent_out.weight.device
        every = [branch_weights(config, t, editing=self._editing) for t in times]
        needed = {tuple(weights): weights for weights in every}  # a time's branches determine their weights
        seen = {branch for branches in needed for branch in branches}
        packs = {
            branches: split_prefix(pack_branches(model, conditions, branches, seen, text_tokenizer))
            for branches in needed
        }
        prefix = next(iter(packs.values()))[0].to(device)  # equal in all packs
        cache = PrefixCache(model.attention_backend)
        clean_times = torch.zeros(len(prefix.image_noisy), device=device)
        model(prefix, prefix.latents, clean_times, attention=cache.fill(prefix.attention))
        self._velocities: dict[tuple[Branch, ...], Graphed] = {}
        for branches, (_, on_cpu) in packs.items():
            noisy = on_cpu.to(device)
            velocity = partial(_guided, model, noisy, cache.extend(noisy.attention), needed[branches], config)
            self._velocities[branches] = Graphed(velocity, [model])

    def __call__(self, x_SPC: Tensor, t: float) -> Tensor:
        """[S, P, C] -> [S, P, C]."""
        branches = tuple(branch_weights(self._config, t, editing=self._editing))
        return self._velocities[branches](x_SPC, torch.full((), t, device=x_SPC.device))


def _guided(
    model: Generator,
    noisy: PackedBatch,
    attention: JointAttention,
    weights: Mapping[Branch, float],
    config: GuidanceConfig,
    x_SPC: Tensor,
    t: Tensor,
) -> Tensor:
    """The velocity [S, P, C] at time `t`, fp32 scalar, through one pack: a function of `x_SPC` and `t` alone."""
    x_SBPC = x_SPC[:, None].expand(-1, len(weights), -1, -1)
    t_I = t.expand(len(noisy.image_noisy))
    v_SBPC = model(noisy, x_SBPC.flatten(0, 2), t_I, attention=attention).view(x_SBPC.shape)
    return guide(v_SBPC, weights, config)


def pack_branches(
    model: Generator,
    conditions: Sequence[Condition],
    branches: Sequence[Branch],
    seen: set[Branch],
    text_tokenizer: TextTokenizer,
) -> PackedBatch:
    """One pack (on the CPU) with one sample for each condition: [none] [sources] [source] [text] [full].

    A branch's noisy image stands right after the parts that the branch may see. Nothing else sees a noisy image, so one
    sample serves all branches. `seen`: all branches that share the prefix.
    """
    target = ImageSplit(torch.zeros(model.latents.shape), noisy=True)
    samples: list[list[TextSplit | ImageSplit]] = []
    for condition in conditions:
        splits: list[TextSplit | ImageSplit] = [target] if "none" in branches else []
        if seen & {"source", "full"}:
            for source in condition.sources:
                splits.append(ImageSplit(normalise(source.cpu().float(), model.latents), noisy=False))
        if "source" in branches:
            splits.append(target)
        if "full" in seen:
            splits.append(TextSplit(condition.text_ids))
        if "full" in branches:
            splits.append(target)
        samples.append(splits)
    return build_packed_batch(
        samples,
        vision_start_id=text_tokenizer.vision_start_id,
        vision_end_id=text_tokenizer.vision_end_id,
        max_side=model.config.max_side,
        seed=0,
        sample_ids=[str(index) for index in range(len(samples))],
    )
