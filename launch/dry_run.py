"""--dry-run: the resolved config, parameter counts, and memory and time before anything is started."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from data.shards import LatentInfo, ShardDataset
from engine.config import UserError, dump
from engine.engine_config import EngineConfig
from engine.objective import Objective
from generator.class_conditional import sizing as class_sizing
from generator.class_conditional.model import new_generator
from generator.class_conditional.sizing import num_tokens
from generator.flow import resolve_shift
from generator.model import Generator
from generator.sizing import activation_bytes, training_flops, typical_pack
from launch.runs import ClassRun, GeneratorRun, TokenizerRun
from tokenizer.rpiae import Autoencoder, without_download
from tokenizer.stages import autoencoder_config

GPU_COUNTS = (1, 8, 32, 256)
TEXT_TOKENS = 102
"""Of a caption of 100 tokens, where nothing has been counted yet."""
INSTRUCTION_TOKENS = 32
FLOPS_PER_GPU = 400e12
"""About 40% of an H100's 989 TFLOP/s in bf16: what a well-fed run reaches."""
NODE_GPUS = 8
LINK_BYTES_PER_S = {True: 300e9, False: 40e9}
"""Of one GPU, within a node and beyond: what is reached of NVLink's 450 GB/s and of InfiniBand NDR's 50 GB/s."""
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


@dataclass(frozen=True)
class Plan:
    """A generator's run in numbers: bytes, seconds."""

    counts: dict[str, int]
    num_trained: int
    num_tokens: int
    num_images: int
    step_flops: float
    activations: int
    engine: EngineConfig
    num_streams: int
    checkpointing: bool

    def memory_gib(self, num_gpus: int) -> float:
        """Of one GPU: weights, gradients, optimizer, activations; CUDA's own and communication's 2 or 3 come on top."""
        state = state_bytes(
            self.engine, self.num_trained, sum(self.counts.values()) - self.num_trained, num_gpus
        )
        return (state + self.activations) / 2**30

    def compute_s(self, num_gpus: int) -> float:
        """Of a step; GPUs with fewer packs than others wait for them."""
        packs = -(-self.num_streams // num_gpus)
        recomputing = 4 / 3 if self.checkpointing else 1.0
        return self.step_flops / self.num_streams * packs * recomputing / FLOPS_PER_GPU

    def exchange_s(self, num_gpus: int) -> float:
        """Of a step: fp32 gradients to their owners, bf16 weights back (nothing overlaps with computing).

        ZeRO-1 exchanges once a step; 2 sends the gradients of every pack, 3 fetches weights twice for each as well.
        """
        packs = -(-self.num_streams // num_gpus)
        gradients, weights = {1: (1, 1), 2: (packs, 1), 3: (packs, 2 * packs)}[self.engine.zero_stage]
        num_bytes = (4 * gradients + 2 * weights) * self.num_trained * (num_gpus - 1) / num_gpus
        return num_bytes / LINK_BYTES_PER_S[num_gpus <= NODE_GPUS]

    def hours(self, num_gpus: int) -> float:
        """Of the whole run."""
        return (self.compute_s(num_gpus) + self.exchange_s(num_gpus)) * self.engine.steps / 3600


def tokenizer_run(run: TokenizerRun) -> str:
    """Report of a tokenizer stage."""
    with torch.device("meta"):
        model = Autoencoder(without_download(autoencoder_config(run.stage)))
    pivot = ("encoder", "decoder") if run.stage.train_encoder else ("decoder",)
    trained = {"pivot": pivot, "bridge": ("bridge",), "decoder": ("decoder",)}
    parts = {name: part for name, part in model.named_children() if name in ("encoder", "bridge", "decoder")}
    counts = {name: num_parameters(part) for name, part in parts.items()}
    num_trained = sum(counts[name] for name in trained.get(run.stage.stage, tuple(counts)))
    num_tokens = model.latent_shape[1] * model.latent_shape[2]
    images = run.pixels.images_per_pack * run.data.num_streams
    flops = 6.0 * sum(counts.values()) * images * num_tokens
    return _report(run, run.engine, counts, num_trained, flops, f"{images} images")


def generator_run(run: GeneratorRun, *, is_edit: bool) -> str:
    """Report of a text-to-image or editing run. Without the shards, the latents' shape is assumed and said so."""
    note, shape = _latent_shape(run)
    plan = generator_plan(run, shape, is_edit=is_edit)
    each = f"{plan.activations / run.packing.tokens_per_pack / 1024:,.0f} KiB a token"
    step = f"{plan.num_tokens:,} tokens, about {plan.num_images:,} targets"
    return _plan_report(run, plan, note, shape, step, each)


def class_run(run: ClassRun) -> str:
    """Report of a class-conditional run, as `generator_run`."""
    note, shape = _latent_shape(run)
    plan = class_plan(run, shape)
    each = f"{plan.activations / run.packing.images_per_pack / 2**20:,.0f} MiB an image"
    step = f"{plan.num_images:,} images of {num_tokens(run.generator, shape)} tokens"
    return _plan_report(run, plan, note, shape, step, each)


def _latent_shape(run: GeneratorRun | ClassRun) -> tuple[str, tuple[int, int, int]]:
    """A note where the shape is assumed, and the shape."""
    shape = LATENT_SHAPES.get(run.autoencoder or "", PAPER_LATENTS)
    try:
        first = next(iter(run.data.sets.values())).shards
        latents = ShardDataset.open(first, run.data.storage).manifest.latent
    except UserError as error:
        return f"note: {error}; sizes below are for latents of {'x'.join(map(str, shape))}\n", shape
    return "", shape if latents is None else latents.shape


def _plan_report(
    run: GeneratorRun | ClassRun, plan: Plan, note: str, shape: tuple[int, int, int], step: str, each: str
) -> str:
    engine = run.engine
    lines = [
        note + dump(run) + "---",
        *(f"parameters: {name} {count:,}" for name, count in plan.counts.items()),
    ]
    lines += [
        f"trained: {plan.num_trained:,} of {sum(plan.counts.values()):,}",
        f"time shift of {'x'.join(map(str, shape))}: {resolve_shift(run.flow.time_shift, shape):.3g}",
        f"a step: {step}, {plan.step_flops:.3g} FLOP; {engine.steps:,} steps",
        f"activations of a pack: {plan.activations / 2**30:.1f} GiB, {each}",
        f"on N GPUs (ZeRO-{engine.zero_stage}), memory of each; a step's computing at {FLOPS_PER_GPU:.0e} FLOP/s and "
        "exchange; the run:",
    ]
    for gpus in GPU_COUNTS:
        if gpus > run.data.num_streams:
            lines.append(f"  {gpus:3d}: refused, a step has {run.data.num_streams} packs (data.num_streams)")
            continue
        seconds = f"{plan.compute_s(gpus):7.3f} s + {plan.exchange_s(gpus):5.3f} s"
        lines.append(f"  {gpus:3d}: {plan.memory_gib(gpus):6.1f} GiB, {seconds}, {plan.hours(gpus):9.1f} h")
    return "\n".join(lines)


def generator_plan(run: GeneratorRun, shape: tuple[int, int, int], *, is_edit: bool) -> Plan:
    """The arithmetic, for equal samples: captions of 100 tokens, or a source and an instruction of 30."""
    channels, *grid = shape
    latents = LatentInfo("bf16", shape, (0.0,) * channels, (1.0,) * channels, "", "")
    with torch.device("meta"):
        model = Generator(run.generator, latents)
    streams, is_checkpointed = run.data.num_streams, run.flow.activation_checkpointing
    num_tokens = run.packing.tokens_per_pack * streams
    step = typical_pack(
        num_tokens,
        INSTRUCTION_TOKENS if is_edit else TEXT_TOKENS,
        (grid[0], grid[1]),
        num_sources=int(is_edit),
        num_draws=run.packing.draws_per_caption,
    )
    return Plan(
        counts={name: num_parameters(part) for name, part in model.named_children()},
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_tokens=num_tokens,
        num_images=step.num_targets,
        step_flops=training_flops(step, run.generator, channels),
        activations=activation_bytes(
            step.times(1 / streams),
            run.generator,
            channels,
            precision=run.engine.precision,
            checkpointing=is_checkpointed,
        ),
        engine=run.engine,
        num_streams=streams,
        checkpointing=is_checkpointed,
    )


def class_plan(run: ClassRun, shape: tuple[int, int, int]) -> Plan:
    """The arithmetic."""
    latents = LatentInfo("bf16", shape, (0.0,) * shape[0], (1.0,) * shape[0], "", "")
    with torch.device("meta"):
        model = new_generator(run.generator, latents)
    streams, is_checkpointed = run.data.num_streams, run.flow.activation_checkpointing
    num_images = run.packing.images_per_pack * streams
    counts = {name: num_parameters(part) for name, part in model.named_children()}
    counts["positions"] = model.pos_embed.numel()
    return Plan(
        counts=counts,
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_tokens=num_images * num_tokens(run.generator, shape),
        num_images=num_images,
        step_flops=class_sizing.training_flops(run.generator, shape, num_images),
        activations=class_sizing.activation_bytes(
            run.generator,
            shape,
            run.packing.images_per_pack,
            precision=run.engine.precision,
            checkpointing=is_checkpointed,
        ),
        engine=run.engine,
        num_streams=streams,
        checkpointing=is_checkpointed,
    )


def objective_run(run: object, objective: Objective) -> str:
    """Report of a small training whose model is built anyway."""
    return f"{dump(run)}---\nparameters: {num_parameters(objective.model):,}"


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(engine: EngineConfig, num_trained: int, num_frozen: int, num_gpus: int) -> float:
    """Bytes a GPU holds all the time: weights, gradients, masters, two moments, EMA (activations come on top).
    Muon keeps one moment for its matrices, so for it this is an upper bound.

    ZeRO (Rajbhandari et al. 2020, section 3): stage 1 shards masters and moments, 2 also gradients, 3 also weights.
    """
    weight = 2 if engine.precision == "bf16" else 4
    optimizer = 12 + (4 if engine.ema_decay else 0)  # fp32 master, two moments, EMA
    weights = (num_trained + num_frozen) * weight / (num_gpus if engine.zero_stage == 3 else 1)
    gradients = num_trained * 4 / (num_gpus if engine.zero_stage >= 2 else 1)
    return weights + gradients + num_trained * optimizer / num_gpus


def _report(
    run: object,
    engine: EngineConfig,
    counts: dict[str, int],
    num_trained: int,
    step_flops: float,
    step_text: str,
) -> str:
    flops = step_flops * engine.steps
    lines = [dump(run) + "---"]
    lines += [f"parameters: {name} {count:,}" for name, count in counts.items()]
    lines += [
        f"trained: {num_trained:,} of {sum(counts.values()):,}",
        f"a step: {step_text}, {step_flops:.3g} FLOP; {engine.steps:,} steps",
    ]
    lines.append(
        f"on N GPUs (ZeRO-{engine.zero_stage}), memory without activations, time at {FLOPS_PER_GPU:.0e} FLOP/s each:"
    )
    for gpus in GPU_COUNTS:
        gib = state_bytes(engine, num_trained, sum(counts.values()) - num_trained, gpus) / 2**30
        lines.append(f"  {gpus:3d}: {gib:6.2f} GiB, {flops / (FLOPS_PER_GPU * gpus) / 3600:8.2f} h")
    return "\n".join(lines)
