"""Training at the paper's size on one GPU: python -m benchmarks.throughput [--compile] [--kernels flash varlen sdpa]

Qwen2.5-0.5B's mixture on RPiAE latents (64 x 16 x 16), packs of captions as CC12M-LLaVA-Next's are long, bf16 weights,
forward and backward pass: tokens and images a second, peak memory, MFU of useful work for each attention kernel, and
the slowest operations with --profile. Without a GPU, `--layers 1 --tokens 1024 --device cpu` shows that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch

from data.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.shards import LatentInfo
from engine.config import UserError
from engine.spans import peak_flops
from evaluation.environment import machine, versions
from generator.attention import Backend, choose_backend
from generator.model import Generator, GeneratorConfig
from generator.qwen import QWEN2_5_0_5B
from generator.sizing import PackSize, training_flops

LATENTS = LatentInfo("bf16", (64, 16, 16), (0.0,) * 64, (1.0,) * 64, "", "")
IMAGE_TOKENS = 16 * 16 + 2
WARM_UP_STEPS = 3


def main() -> None:
    """One line for each kernel that runs here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=49_152, help="of a step")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", nargs="+", default=["flash", "varlen", "sdpa"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    print(f"machine: {machine()}\nversions: {versions()}\n{vars(arguments)}")
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _model(arguments.layers).to(device, dtype)
    model.backbone.activation_checkpointing = arguments.checkpointing
    if arguments.compile:
        model.compile_layers()
    batch = _pack(arguments.tokens).to(device)
    flops = training_flops(PackSize.of(batch), model.config, LATENTS.shape[0])
    for kernel in arguments.kernels:
        try:
            choose_backend(device, dtype, kernel)
        except UserError as error:
            print(f"{kernel}: {error}")
            continue
        _measure(model, batch, kernel, arguments.steps, flops, arguments.profile)


def _measure(
    model: Generator, batch: PackedBatch, kernel: Backend, num_steps: int, flops: float, profile: bool
) -> None:
    model.attention_backend = kernel
    device = batch.latents.device
    for _ in range(WARM_UP_STEPS):
        _step(model, batch)
    _synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin_s = time.perf_counter()
    for _ in range(num_steps):
        _step(model, batch)
    _synchronise(device)
    seconds = (time.perf_counter() - begin_s) / num_steps
    peak = peak_flops(device)
    mfu = f", MFU {flops / seconds / peak:.1%}" if peak else ""
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(
        f"{kernel}: {batch.attention.num_tokens / seconds:,.0f} tokens/s, {batch.num_targets / seconds:,.1f} images/s, "
        f"{flops / seconds / 1e12:.2f} TFLOP/s{mfu}{memory}"
    )
    if profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            _step(model, batch)
            _synchronise(device)
        print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=20))


def _step(model: Generator, batch: PackedBatch) -> None:
    model.zero_grad(set_to_none=True)
    times = batch.latents.new_full((len(batch.image_noisy),), 0.5)
    model(batch, batch.latents, times).square().mean().backward()  # type: ignore[no-untyped-call]


def _model(num_layers: int) -> Generator:
    backbone = dataclasses.replace(QWEN2_5_0_5B, num_layers=num_layers)
    return Generator.create(GeneratorConfig(backbone, max_side=64), LATENTS, seed=0)


def _pack(num_tokens: int) -> PackedBatch:
    """Captions of 60 to 160 tokens, until the budget is full."""
    generator = np.random.default_rng(0)
    image = ImageSplit(torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(0)), noisy=True)
    samples: list[list[TextSplit | ImageSplit]] = []
    while True:
        length = int(generator.integers(60, 160))
        num_tokens -= length + IMAGE_TOKENS
        if num_tokens < 0 and samples:
            break
        samples.append([TextSplit(generator.integers(0, 150_000, length).tolist()), image])
    return build_packed_batch(
        samples,
        vision_start_id=1,
        vision_end_id=2,
        max_side=64,
        seed=0,
        sample_ids=["sample"] * len(samples),
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
