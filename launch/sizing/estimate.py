"""The arithmetic of a run before it starts: memory, time, storage. What --dry-run, recipes and preflight print."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from base.config import UserError
from data.shards import LatentInfo, ShardDataset
from engine.engine_config import EngineConfig
from engine.memory import StateBytes
from generator.class_conditional import sizing as class_sizing
from generator.class_conditional.alignment import AlignedGenerator
from generator.class_conditional.model import new_generator
from generator.model import Generator
from generator.sizing import activation_bytes, attention_flops, training_flops, typical_pack
from generator.traffic import (
    END_LAUNCHES,
    LAYER_LAUNCHES,
    MOVED_PER_KEPT,
    ValueBytes,
    moved_bytes,
    num_launches,
)
from launch.runs.configs import ClassRun, GeneratorRun, TokenizerRun
from launch.sizing.stage_size import PhaseSize, count_parameters, num_parameters, stage_size
from launch.sizing.step_time import H100, StepTime, Work, step_time

TEXT_TOKENS = 102
"""Of a caption of 100 tokens, where nothing has been counted yet."""
INSTRUCTION_TOKENS = 32
PEAK = H100.peak_flops
EXPERTS = 2
"""Of a mixture's layer; a class-conditional block is like one of them."""
CONTEXT_GIB = 3.0
"""Of a GPU, for CUDA itself, communication and what the allocator cannot use."""
LATENT_SHAPES = {
    "runs/imagenet/decoder/export": (64, 16, 16),
    "runs/ablations/table5c/latent32/decoder/export": (32, 16, 16),
    "runs/ablations/table5c/latent128/decoder/export": (128, 16, 16),
    "runs/rae": (768, 16, 16),
    "runs/rae-s": (384, 16, 16),
    "runs/ablations/table2/raw_adaptive/export": (768, 16, 16),
    "runs/ablations/table2/normalised/export": (768, 16, 16),
    "runs/ablations/table2/fixed_weight/export": (768, 16, 16),
    "runs/va-vae": (32, 16, 16),
    "runs/sd-vae": (4, 32, 32),
    "runs/flux-vae": (16, 32, 32),
}
"""What the autoencoders in configs/generator make of 256 px, by folder; as soon as there are shards, they decide."""
PAPER_LATENTS = (64, 16, 16)
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A run in numbers. Counts are of parameters, sizes bytes, times seconds."""

    trained: dict[str, int]
    """By module of the model."""
    frozen: dict[str, int]
    num_adversary: int
    helper_bytes: int
    """Frozen networks beside the model, whole on every GPU."""
    phases: tuple[PhaseSize, ...]
    """What a training step is like at first, then, and at last."""
    phase_steps: tuple[int, ...]
    """Steps of the run that are like each of them."""
    works: tuple[Work, ...]
    """What a pack is to a GPU in each of them."""
    num_tokens: int
    """Of a step over all GPUs; the tokenizer's are places of the token grid."""
    num_images: int
    """Of a step; a generator's targets."""
    pack_units: int
    """Size of a pack in the config's unit: tokens, or images."""
    engine: EngineConfig
    num_streams: int
    recomputing: float = 1.0
    """Executed products over those in `phases` (activation checkpointing)."""
    num_unexported: int = 0
    """Parameters that only the training needs."""

    @property
    def num_trained(self) -> int:
        """Of the model."""
        return sum(self.trained.values())

    @property
    def num_parameters(self) -> int:
        """Of the model, trained or not."""
        return self.num_trained + sum(self.frozen.values())

    @property
    def activations(self) -> int:
        """Of a pack, in the fullest phase."""
        return max(phase.activations for phase in self.phases)

    @property
    def step_flops(self) -> float:
        """Of a step, in the last phase."""
        return self.phases[-1].flops * self.num_streams

    @property
    def run_flops(self) -> float:
        """Of all steps, without what checkpointing does again in a generator."""
        each = zip(self.phases, self.phase_steps, strict=True)
        return sum(phase.flops * steps for phase, steps in each) * self.num_streams

    def packs(self, num_gpus: int) -> int:
        """Of the fullest rank in a step."""
        return -(-self.num_streams // num_gpus)

    def at(self, zero_stage: int) -> Plan:
        """The same under another ZeRO stage."""
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, zero_stage=zero_stage))

    def model_state(self, num_gpus: int, num_packs: int | None = None) -> StateBytes:
        """Of one GPU. `num_packs` of a rank, if not those of the config."""
        packs = self.packs(num_gpus) if num_packs is None else num_packs
        frozen = self.num_parameters - self.num_trained
        return StateBytes.of(self.engine, self.num_trained, frozen, num_gpus, accumulates=packs > 1)

    def adversary_state(self, num_gpus: int, num_packs: int | None = None) -> StateBytes:
        """Of one GPU: the discriminator's engine, which has no average; zeros without one."""
        if not self.num_adversary:
            return StateBytes(*[0.0] * 6)
        packs = self.packs(num_gpus) if num_packs is None else num_packs
        engine = dataclasses.replace(self.engine, ema_decay=0.0)
        return StateBytes.of(engine, self.num_adversary, 0, num_gpus, accumulates=packs > 1)

    def peak(self, num_gpus: int, phase: PhaseSize | None = None, num_packs: int | None = None) -> float:
        """Bytes of one GPU at the fullest moment of a step like `phase`, or of the run, without CUDA's CONTEXT_GIB."""
        if phase is None:
            return max(self.peak(num_gpus, each, num_packs) for each in self.phases)
        state, adversary = self.model_state(num_gpus, num_packs), self.adversary_state(num_gpus, num_packs)
        accumulates = (self.packs(num_gpus) if num_packs is None else num_packs) > 1
        if (
            phase.updates_adversary and accumulates and self.engine.zero_stage == 1
        ):  # it keeps its bucket till the end
            return (state + adversary).peak(phase.activations) + self.helper_bytes
        peak = state.peak(phase.activations) + adversary.lasting
        if phase.updates_adversary:  # its backward pass comes after the model's
            kept = state.lasting + (state.gradients if accumulates else 0)
            peak = max(peak, adversary.peak(phase.activations) + kept)
        return peak + self.helper_bytes

    def memory_gib(self, num_gpus: int) -> float:
        """`peak`."""
        return self.peak(num_gpus) / GIB

    def step_time(self, num_gpus: int, phase: int = -1) -> StepTime:
        """Of a step in the last phase, or another; GPUs with fewer packs than others wait for them."""
        return step_time(
            self.works[phase].times(self.recomputing),
            self.engine,
            num_trained=self.num_trained + self.num_adversary,
            num_packs=self.packs(num_gpus),
            num_gpus=num_gpus,
        )

    def compute_s(self, num_gpus: int, mfu: float | None = None) -> float:
        """Of a step's packs in the last phase. `mfu`: of an H100's peak, in place of the parts."""
        return self._compute_s(num_gpus, len(self.phases) - 1, mfu)

    def exchange_s(self, num_gpus: int) -> float:
        """Of a step, once: gradients to their owners, the optimizer, weights back."""
        return self.step_time(num_gpus).exchange_s

    def hours(self, num_gpus: int, mfu: float | None = None) -> float:
        """Of the whole run."""
        compute_s = sum(
            self._compute_s(num_gpus, index, mfu) * steps for index, steps in enumerate(self.phase_steps)
        )
        return (compute_s + self.exchange_s(num_gpus) * self.engine.steps) / 3600

    def _compute_s(self, num_gpus: int, phase: int, mfu: float | None) -> float:
        if mfu is None:
            return self.step_time(num_gpus, phase).compute_s
        return self.phases[phase].flops * self.packs(num_gpus) * self.recomputing / (mfu * PEAK)

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, all ranks' files: masters, two moments, averages; discriminator. Muon has one moment for
        its matrices: for it an upper bound.
        """
        average = 4 * len(self.engine.ema_decays)
        return self.num_trained * (12 + average) + self.num_adversary * 12

    def export_bytes(self) -> int:
        """Of the export: averaged weights, whole."""
        return (self.num_parameters - self.num_unexported) * (2 if self.engine.precision == "bf16" else 4)


def generator_plan(run: GeneratorRun, shape: tuple[int, int, int], *, is_edit: bool) -> Plan:
    """For equal samples: captions of 100 tokens, or a source and an instruction of 30."""
    channels, *grid = shape
    with torch.device("meta"):
        trained, frozen = count_parameters(Generator(run.generator, untrained_latents(shape)))
    streams, is_checkpointed = run.data.num_streams, run.flow.activation_checkpointing
    num_tokens = run.packing.tokens_per_pack * streams
    step = typical_pack(
        num_tokens,
        INSTRUCTION_TOKENS if is_edit else TEXT_TOKENS,
        (grid[0], grid[1]),
        num_sources=int(is_edit),
        num_draws=run.packing.draws_per_caption,
    )
    pack = step.times(1 / streams)
    activations = activation_bytes(
        pack,
        run.generator,
        channels,
        precision=run.engine.precision,
        checkpointing=is_checkpointed,
    )
    flops, attention = training_flops(pack, run.generator, channels), attention_flops(pack, run.generator)
    values, compiled = ValueBytes.of(run.engine.precision), run.flow.compile
    moved = moved_bytes(pack, run.generator, channels, values, compiled=compiled)
    work = Work(flops - attention, attention, moved, num_launches(run.generator, compiled=compiled))
    return Plan(
        trained=trained,
        frozen=frozen,
        num_adversary=0,
        helper_bytes=0,
        phases=(PhaseSize("a step", activations, training_flops(step, run.generator, channels) / streams),),
        phase_steps=(run.engine.steps,),
        works=(work,),
        num_tokens=num_tokens,
        num_images=step.num_targets,
        pack_units=run.packing.tokens_per_pack,
        engine=run.engine,
        num_streams=streams,
        recomputing=4 / 3 if is_checkpointed else 1.0,
    )


def class_plan(run: ClassRun, shape: tuple[int, int, int]) -> Plan:
    """Of class-conditional generation on latents of `shape`; its attention's time is in that of the products."""
    align = run.flow.align
    with torch.device("meta"):
        model = new_generator(run.generator, untrained_latents(shape))
        aligned = None if align is None else AlignedGenerator(model, align, run.engine.seed)
    trained, frozen = count_parameters(model)
    trained["positions"], frozen["positions"] = 0, model.pos_embed.numel()
    num_unexported = 0
    if aligned is not None:
        num_unexported = num_parameters(aligned.projection)
        trained["projection"], frozen["projection"] = num_unexported, 0
    streams, is_checkpointed = run.data.num_streams, run.flow.activation_checkpointing
    pack_images = run.packing.images_per_pack
    activations = class_sizing.activation_bytes(
        run.generator,
        shape,
        pack_images,
        precision=run.engine.precision,
        checkpointing=is_checkpointed,
        num_weights=sum(trained.values()),
        align=align,
    )
    kept = class_sizing.activation_bytes(
        run.generator,
        shape,
        pack_images,
        precision=run.engine.precision,
        checkpointing=False,
        num_weights=0,  # copies of weights are counted once a pack by themselves
        align=align,
    )
    flops = class_sizing.training_flops(run.generator, shape, pack_images, align)
    compiled, blocks = run.flow.compile, run.generator.num_layers
    launches = blocks * LAYER_LAUNCHES[compiled] // EXPERTS + END_LAUNCHES
    return Plan(
        trained=trained,
        frozen=frozen,
        num_adversary=0,
        helper_bytes=0,
        phases=(PhaseSize("a step", activations, flops),),
        phase_steps=(run.engine.steps,),
        works=(Work(flops, 0.0, kept * MOVED_PER_KEPT[compiled], launches),),
        num_tokens=class_sizing.num_tokens(run.generator, shape) * pack_images * streams,
        num_images=pack_images * streams,
        pack_units=pack_images,
        engine=run.engine,
        num_streams=streams,
        recomputing=4 / 3 if is_checkpointed else 1.0,
        num_unexported=num_unexported,
    )


def tokenizer_plan(run: TokenizerRun) -> Plan:
    """What a stage needs, by running its code without values (launch/sizing/stage_size.py).

    The host is taken to keep up. The attention's time is in that of the products.
    """
    size = stage_size(run.stage, run.pixels, run.engine.precision)
    steps, starts = run.engine.steps, [0]
    if len(size.phases) > 1:
        last = min(max(run.stage.gan_loss_start_step, 0), steps)
        starts += [min(run.stage.gan_update_start_step, last), last]
    images = run.pixels.images_per_pack * run.data.num_streams
    return Plan(
        trained=size.trained,
        frozen=size.frozen,
        num_adversary=size.num_adversary,
        helper_bytes=size.helper_bytes,
        phases=size.phases,
        phase_steps=tuple(end - start for start, end in zip(starts, [*starts[1:], steps], strict=True)),
        works=tuple(
            Work(phase.flops, 0.0, phase.activations * MOVED_PER_KEPT[False], launches=0)
            for phase in size.phases
        ),
        num_tokens=images * size.latent_shape[1] * size.latent_shape[2],
        num_images=images,
        pack_units=run.pixels.images_per_pack,
        engine=run.engine,
        num_streams=run.data.num_streams,
    )


def latent_shape(run: GeneratorRun | ClassRun) -> tuple[tuple[int, int, int], str]:
    """Of the shards, and ""; without them of the run's autoencoder or the paper's (as far as the position table goes),
    and a note that says so.
    """
    shape = LATENT_SHAPES.get(run.autoencoder or "", PAPER_LATENTS)
    if isinstance(run, GeneratorRun):
        channels, *grid = shape
        height, width = (min(side, run.generator.max_side) for side in grid)
        shape = (channels, height, width)
    try:
        first = next(iter(run.data.sets.values())).shards
        latents = ShardDataset.open(first, run.data.storage).manifest.latent
    except UserError as error:
        return shape, f"note: {error}; sizes below are for latents of {'x'.join(map(str, shape))}"
    return (shape if latents is None else latents.shape), ""


def untrained_latents(shape: tuple[int, int, int], text_tokenizer: str = "") -> LatentInfo:
    """Latents of a shape that have not been made."""
    return LatentInfo("bf16", shape, (0.0,) * shape[0], (1.0,) * shape[0], "", text_tokenizer)
