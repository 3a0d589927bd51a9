"""Stage I's step with adaptive weights: tokenizer/training/adaptive.py against the plain backward passes, in one run.

Both ways get equal weights and batches. First their gradients are compared, then both are timed in turns, before and
after the adversarial loss starts. Networks are the paper's with random weights (speed does not depend on them):
DINOv2-B encoder with registers, ViT-B decoder, VGG16 for LPIPS, ViT-S/8 for the discriminator. On a GPU the benchmark
also runs ViT-XL (--decoder xl), in bf16 autocast, and prints peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from data.samples.images import PixelBatch
from engine.deepspeed_engine import autocast
from engine.engine_config import Precision
from engine.memory import TensorBytes
from evaluation.environment import machine, versions
from tokenizer.config import AutoencoderConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.training.adaptive_reference import plain_mean_loss
from tokenizer.training.build_stage import build_stage
from tokenizer.training.objectives import PivotObjective
from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig, StageConfig

DECODERS = {
    "b": PixelDecoderConfig(width=768, layers=12, heads=12, mlp_width=3072, patch_px=16),
    "xl": PixelDecoderConfig(),
}
TOLERANCE = 1e-3
"""Relative difference of the whole gradient that fp32 rounding explains (bf16 rounds at every layer)."""
STEPS = {"before the adversarial loss": 0, "with it": 1}
"""Phase -> a step of it in `build`'s schedule."""


def main() -> None:
    """Prints for each phase the difference of the gradients, seconds of each way, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="b")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        vgg16 = Path(folder) / "vgg16.pth"
        write_random_vgg16(vgg16)
        objective = build(arguments.decoder, str(vgg16))
    objective.to(device)
    pixels = torch.randint(
        0, 256, (arguments.batch, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    names = tuple(str(index) for index in range(arguments.batch))
    batch = PixelBatch(pixels, names, 1, tuple({} for _ in names)).to(device)
    precision: Precision = "bf16_autocast" if device.type == "cuda" else "fp32"
    print(
        f"machine: {machine()}\nversions: {versions()}\n{device.type}, {precision}, batch {arguments.batch}"
    )
    for phase, step in STEPS.items():
        print(phase)
        compare(objective, batch, step, precision, arguments.repeats)


def compare(
    objective: PivotObjective, batch: PixelBatch, step: int, precision: Precision, repeats: int
) -> None:
    """Compares and times one phase, and prints it."""
    device = batch.pixels.device

    def ours() -> None:
        with autocast(precision, device):
            loss = objective.loss(batch, step).loss_sum / len(batch.pixels)
        loss.backward()

    def plain() -> None:
        with autocast(precision, device):
            loss = plain_mean_loss(objective, batch, step)
        loss.backward()

    with TensorBytes([]) as ours_counted:
        found = gradient(ours, objective.model)
    with TensorBytes([]) as plain_counted:
        expected = gradient(plain, objective.model)
    difference = relative_difference(found, expected)
    flops = ours_counted.flops, plain_counted.flops
    print(f"gradients: relative difference {difference:.1e}")
    print(
        f"products, TFLOP: ours {flops[0] / 1e12:.3f}, plain {flops[1] / 1e12:.3f}: {flops[0] / flops[1]:.3f}"
    )
    if precision == "fp32" and difference > TOLERANCE:
        raise SystemExit(f"gradients differ by more than {TOLERANCE}: the times mean nothing")
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    peaks = {}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("plain", plain)):
            objective.model.zero_grad(set_to_none=True)
            duration, peaks[name] = measured(run, device)
            seconds[name].append(duration)
    clock = "CPU s (all threads)" if device.type == "cpu" else "s"
    for name, values in seconds.items():
        memory = f"  peak {peaks[name] / 2**30:.2f} GiB" if peaks[name] else ""
        print(
            f"{name:6s} {statistics.median(values):8.3f} {clock}, all {[round(v, 3) for v in values]}{memory}"
        )
    pairs = zip(seconds["ours"], seconds["plain"], strict=True)
    print(
        f"ours / plain: {statistics.median(ours / plain for ours, plain in pairs):.3f} (median of the pairs)"
    )
    sys.stdout.flush()


def build(decoder: str, vgg16: str) -> PivotObjective:
    """The pivot stage with every loss on. E is moved away from its replica: all gradients are of ordinary size."""
    encoder = RepresentationConfig(
        "vit_base_patch14_reg4_dinov2.lvd142m", 224, "random", {"img_size": 224}, None, None
    )
    features = RepresentationConfig("vit_small_patch8_224.dino", 224, "random")
    config = StageConfig(
        stage="pivot",
        autoencoder=AutoencoderConfig(encoder, DECODERS[decoder], 256),
        perceptual=PerceptualConfig(vgg16_weights=vgg16),
        discriminator=DiscriminatorConfig(features),
        adaptive_pivot_start_step=0,
        gan_loss_start_step=STEPS["with it"],
    )
    objective = build_stage(config)
    assert isinstance(objective, PivotObjective)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter += 0.002 * torch.randn(parameter.shape, generator=noise)
    return objective


def write_random_vgg16(path: Path) -> None:
    """Writes a file like torchvision's VGG16, with random convolutions that keep activations of ordinary size."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, module in LpipsVgg16().vgg.named_modules():
        if isinstance(module, nn.Conv2d):
            std = (2.0 / module.weight[0].numel()) ** 0.5
            state[f"features.{name}.weight"] = torch.randn(module.weight.shape, generator=generator) * std
            state[f"features.{name}.bias"] = torch.zeros(len(module.weight))
    torch.save(state, path)


def gradient(run: Callable[[], None], model: nn.Module) -> list[Tensor]:
    """All gradients after one run from zero gradients."""
    model.zero_grad(set_to_none=True)
    run()
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters."""
    difference = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    return (difference / sum(float(y.double().square().sum()) for y in b)) ** 0.5


def measured(run: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds (CPU time of all threads on a CPU, wall time on a GPU) and peak bytes on the GPU."""
    if device.type == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin, 0
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
