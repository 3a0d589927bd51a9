"""--dry-run: the resolved config, parameter counts, and memory and time before anything is started."""

from __future__ import annotations

import torch
from torch import nn

from data.shards import LatentInfo, ShardDataset
from engine.config import UserError, dump
from engine.engine_config import EngineConfig
from engine.objective import Objective
from generator.model import Generator
from generator.sizing import training_flops, typical_pack
from launch.runs import GeneratorRun, TokenizerRun
from tokenizer.rpiae import Autoencoder, without_download
from tokenizer.stages import autoencoder_config

GPU_COUNTS = (1, 8, 32, 256)
TEXT_TOKENS = 100
"""Of a caption or instruction, where nothing has been counted yet."""
FLOPS_PER_GPU = 400e12
"""About 40% of an H100's 989 TFLOP/s in bf16: what a well-fed run reaches."""
PAPER_LATENTS = LatentInfo("bf16", (64, 16, 16), (0.0,) * 64, (1.0,) * 64, "", "")


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
    """Report of a text-to-image or editing run. Without the shards, the paper's latents are assumed and said so."""
    note, latents = "", PAPER_LATENTS
    try:
        first = next(iter(run.data.sets.values())).shards
        latents = ShardDataset.open(first, run.data.storage).manifest.latent or latents
    except UserError as error:
        note = f"note: {error}; sizes below are for latents of 64x16x16\n"
    with torch.device("meta"):
        model = Generator(run.generator, latents)
    counts = {name: num_parameters(part) for name, part in model.named_children()}
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = run.packing.tokens_per_pack * run.data.num_streams
    pack = typical_pack(tokens, TEXT_TOKENS, latents.shape[1:], num_sources=int(is_edit))
    flops = training_flops(pack, run.generator, latents.shape[0])
    step = (
        f"{tokens:,} tokens, about {pack.num_images // (1 + is_edit):,} samples of {TEXT_TOKENS} text tokens"
    )
    return note + _report(run, run.engine, counts, num_trained, flops, step)


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
