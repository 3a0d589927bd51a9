"""Estimates a run's memory, time and storage by arithmetic, for --dry-run, recipes and preflight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from base.config import UserError
from data.shards import LatentInfo, ShardDataset
from engine.engine_config import EngineConfig
from engine.memory import StateBytes
from generator.class_conditional import sizing as class_sizing
from generator.class_conditional.alignment import AlignedGenerator
from generator.class_conditional.model import new_generator
from generator.memory_traffic import (
    END_LAUNCHES,
    LAYER_LAUNCHES,
    MOVED_PER_KEPT,
    ValueBytes,
    moved_bytes,
    num_launches,
)
from generator.model import Generator
from generator.sizing import activation_bytes, attention_flops, training_flops, typical_pack
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun
from launch.sizing.step_time import H100, StepTime, Work, step_time
from tokenizer.weights import shapes_only

TEXT_TOKENS = 102
"""Tokens of a text split with a caption of 100 tokens, assumed while nothing has been counted."""
INSTRUCTION_TOKENS = 32
PEAK = H100.peak_flops
EXPERTS = 2
"""Experts in a layer of the mixture of transformers; a class-conditional block resembles one expert."""
CONTEXT_GIB = 3.0
"""GPU memory that CUDA itself, communication and the allocator's fragmentation take."""
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
"""Latent shapes (C, Y, X) at 256 px of configs/generator's autoencoders, by folder. Existing shards take precedence."""
PAPER_LATENTS = (64, 16, 16)
GIB = 2**30


@dataclass(frozen=True)
class PhaseSize:
    """Memory and work of one pack in one phase."""

    name: str
    activations: int
    """Peak bytes."""
    flops: float
    """FLOPs of all executed products, recomputed ones included."""
    updates_adversary: bool = False


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. Counts are in parameters, sizes in bytes, times in seconds."""

    trained: dict[str, int]
    """Trained parameters by module of the model."""
    frozen: dict[str, int]
    num_adversary: int
    helper_bytes: int
    """Size of the frozen networks beside the model, which every GPU holds whole."""
    phases: tuple[PhaseSize, ...]
    """Memory and work of a step in each successive phase of the training."""
    phase_steps: tuple[int, ...]
    """Number of steps in each phase."""
    works: tuple[Work, ...]
    """A GPU's work for one pack in each phase."""
    num_tokens: int
    """Tokens of a step over all GPUs; a tokenizer's tokens are positions of its token grid."""
    num_images: int
    """Images of a step over all GPUs; a generator's targets."""
    pack_units: int
    """Size of a pack in the config's unit: tokens, or images."""
    engine: EngineConfig
    num_streams: int
    recomputing: float = 1.0
    """Ratio of executed products to those in `phases`; above 1 with activation checkpointing."""
    num_unexported: int = 0
    """Parameters that only the training needs."""

    @property
    def num_trained(self) -> int:
        """The model's trained parameters."""
        return sum(self.trained.values())

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return self.num_trained + sum(self.frozen.values())

    @property
    def activations(self) -> int:
        """Bytes of a pack's activations in the fullest phase."""
        return max(phase.activations for phase in self.phases)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step in the last phase."""
        return self.phases[-1].flops * self.num_streams

    @property
    def run_flops(self) -> float:
        """FLOPs of all steps, without a generator's recomputation under checkpointing."""
        each = zip(self.phases, self.phase_steps, strict=True)
        return sum(phase.flops * steps for phase, steps in each) * self.num_streams

    def packs(self, num_gpus: int) -> int:
        """Packs of the fullest rank in a step."""
        return -(-self.num_streams // num_gpus)

    def at(self, zero_stage: int) -> Plan:
        """This plan under another ZeRO stage."""
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, zero_stage=zero_stage))

    def model_state(self, num_gpus: int, num_packs: int | None = None) -> StateBytes:
        """States of the model's engine on one GPU. `num_packs`: packs of a rank; None: from the config."""
        packs = self.packs(num_gpus) if num_packs is None else num_packs
        frozen = self.num_parameters - self.num_trained
        return StateBytes.of(self.engine, self.num_trained, frozen, num_gpus, accumulates=packs > 1)

    def adversary_state(self, num_gpus: int, num_packs: int | None = None) -> StateBytes:
        """States of the discriminator's engine, which has no average, on one GPU; zeros without a discriminator."""
        if not self.num_adversary:
            return StateBytes(*[0.0] * 6)
        packs = self.packs(num_gpus) if num_packs is None else num_packs
        engine = dataclasses.replace(self.engine, ema_decay=0.0)
        return StateBytes.of(engine, self.num_adversary, 0, num_gpus, accumulates=packs > 1)

    def peak(self, num_gpus: int, phase: PhaseSize | None = None, num_packs: int | None = None) -> float:
        """Peak bytes on one GPU in a step of `phase` (None: in the run), without CONTEXT_GIB."""
        if phase is None:
            return max(self.peak(num_gpus, each, num_packs) for each in self.phases)
        state, adversary = self.model_state(num_gpus, num_packs), self.adversary_state(num_gpus, num_packs)
        accumulates = (self.packs(num_gpus) if num_packs is None else num_packs) > 1
        if (
            phase.updates_adversary and accumulates and self.engine.zero_stage == 1
        ):  # the adversary's engine keeps its bucket until the end
            return (state + adversary).peak(phase.activations) + self.helper_bytes
        peak = state.peak(phase.activations) + adversary.lasting
        if phase.updates_adversary:  # the adversary's backward pass comes after the model's
            kept = state.lasting + (state.gradients if accumulates else 0)
            peak = max(peak, adversary.peak(phase.activations) + kept)
        return peak + self.helper_bytes

    def memory_gib(self, num_gpus: int) -> float:
        """`peak` of the run in GiB."""
        return self.peak(num_gpus) / GIB

    def step_time(self, num_gpus: int, phase: int = -1) -> StepTime:
        """Time of a step in `phase` (default: the last). GPUs with fewer packs wait for the others."""
        return step_time(
            self.works[phase].times(self.recomputing),
            self.engine,
            num_trained=self.num_trained + self.num_adversary,
            num_packs=self.packs(num_gpus),
            num_gpus=num_gpus,
        )

    def compute_s(self, num_gpus: int, mfu: float | None = None) -> float:
        """Seconds of a step's packs in the last phase. `mfu`: computes with this share of an H100's peak instead."""
        return self._compute_s(num_gpus, len(self.phases) - 1, mfu)

    def exchange_s(self, num_gpus: int) -> float:
        """Seconds once a step: gradients to their owners, the optimizer, weights back."""
        return self.step_time(num_gpus).exchange_s

    def hours(self, num_gpus: int, mfu: float | None = None) -> float:
        """Hours of the whole run. `mfu`: as in compute_s."""
        compute_s = sum(
            self._compute_s(num_gpus, index, mfu) * steps for index, steps in enumerate(self.phase_steps)
        )
        return (compute_s + self.exchange_s(num_gpus) * self.engine.steps) / 3600

    def _compute_s(self, num_gpus: int, phase: int, mfu: float | None) -> float:
        if mfu is None:
            return self.step_time(num_gpus, phase).compute_s
        return self.phases[phase].flops * self.packs(num_gpus) * self.recomputing / (mfu * PEAK)

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint over all ranks: masters, two moments, averages, and the discriminator.

        An upper bound for Muon, whose matrices have one moment.
        """
        average = 4 * len(self.engine.ema_decays)
        return self.num_trained * (12 + average) + self.num_adversary * 12

    def export_bytes(self) -> int:
        """Bytes of the export of the averaged weights."""
        return (self.num_parameters - self.num_unexported) * (2 if self.engine.precision == "bf16" else 4)


def plan_of(run: Run, shape: tuple[int, int, int] | None) -> Plan:
    """Plan of a training. `shape`: as from `latent_shape`."""
    if isinstance(run, TokenizerRun):
        from launch.sizing.stage_size import (
            tokenizer_plan,  # loads the networks of stages, which takes seconds
        )

        return tokenizer_plan(run)
    assert shape is not None
    return class_plan(run, shape) if isinstance(run, ClassRun) else generator_plan(run, shape)


def generator_plan(run: GeneratorRun, shape: tuple[int, int, int]) -> Plan:
    """Plan of a generator on equal samples: a caption of 100 tokens, or a source and an instruction of 30 tokens."""
    channels, *grid = shape
    is_edit = run.task == "edit"
    with shapes_only():
        trained, frozen = count_parameters(Generator(run.generator, untrained_latents(shape)))
    streams, is_checkpointed = run.data.num_streams, run.flow.activation_checkpointing
    num_tokens = run.packing.tokens_per_pack * streams
    step = typical_pack(
        num_tokens,
        INSTRUCTION_TOKENS if is_edit else TEXT_TOKENS,
        (grid[0], grid[1]),
        num_sources=int(is_edit),
        num_draws=run.packing.draws_per_caption,
        has_text_loss=run.flow.text_loss_weight > 0,
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
    """Plan of class-conditional generation on latents of `shape`. Attention counts among the products."""
    align = run.flow.align
    with shapes_only():
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
        num_weights=0,  # copies of weights are counted separately, once a pack
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


def count_parameters(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of trained and of frozen parameters by child module; children without parameters are left out."""
    trained, frozen = (
        {
            name: sum(p.numel() for p in child.parameters() if p.requires_grad == is_trained)
            for name, child in model.named_children()
            if num_parameters(child)
        }
        for is_trained in (True, False)
    )
    return trained, frozen


def num_parameters(module: nn.Module) -> int:
    """Number of all parameters of a module, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def latent_shape(run: Run) -> tuple[tuple[int, int, int] | None, str]:
    """Shape (C, Y, X) of the shards' latents, None for a tokenizer; and ''.

    Without shards: the shape of the run's autoencoder or the paper's, within the position table, and a note about it.
    """
    if isinstance(run, TokenizerRun):
        return None, ""
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
    """Format of latents of `shape` that do not exist yet."""
    return LatentInfo("bf16", shape, (0.0,) * shape[0], (1.0,) * shape[0], "", text_tokenizer)
