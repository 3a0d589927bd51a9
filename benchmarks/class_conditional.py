"""Class-conditional images a second: a training step, and drawing by solver and number of steps.

Beside each number stands that of the parity tests' plain formulas (benchmarks/plain_dit.py) on equal weights: what a
reader would write down first. Outputs are compared before anything is timed. Every drawing is timed from its first step
to its last; nothing is extrapolated. The paper draws by Euler, in 50 steps and in 250. Beside other work set
OMP_NUM_THREADS=1: threads that wait for each other spin, and CPU time counts that. python -m
benchmarks.class_conditional
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.plain_dit import PlainShape, plain_velocity
from data.packs.class_batch import ClassBatch
from data.shards import LatentInfo
from engine.deepspeed_engine import autocast
from evaluation.environment import machine, versions
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig, DitConfig, WideHeadConfig
from generator.class_conditional.model import ClassGenerator, create_generator
from generator.class_conditional.objective import ClassObjective
from generator.class_conditional.sampling import sample_class_latents
from generator.class_conditional.sizing import training_flops
from generator.flow import draw_noise, resolve_shift, sampling_times
from generator.sampling_config import Solver
from generator.solvers import integrate

SIZES = {
    "tiny": DitConfig(10, 192, 4, 6),
    "s": DitConfig(1000, 384, 12, 6),
    "b": DitConfig(1000, 768, 12, 12),
    "l": DitConfig(1000, 1024, 24, 16),
    "xl": DitConfig(1000, 1152, 28, 16),
    "dh-tiny": DitConfig(10, 192, 4, 6, qk_norm=False, head=WideHeadConfig(384, 2, 6)),
    "dh-xl": DitConfig(1000, 1152, 28, 16, qk_norm=False, head=WideHeadConfig()),
}
TOLERANCE = {"fp32": 1e-3, "bf16_autocast": 5e-2}
"""Relative difference of velocities that rounding explains."""


def main() -> None:
    """Prints images a second, and the ratio of ours to plain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "dh-tiny"])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 250], help="of drawing by Euler")
    parser.add_argument(
        "--heun-steps", type=int, nargs="*", default=[50], help="by Heun: twice the work a step"
    )
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16_autocast" if device.type == "cuda" else "fp32"
    print(f"machine: {machine()}\nversions: {versions()}")
    print(
        f"{arguments.batch} images of {arguments.channels}x{arguments.side}x{arguments.side}, {precision} on "
        f"{device.type}, medians of {arguments.repeats}"
    )
    for size in arguments.sizes:
        with autocast(precision, device):
            _report(size, arguments, device, precision)


def _report(size: str, arguments: argparse.Namespace, device: torch.device, precision: str) -> None:
    channels, side, count = arguments.channels, arguments.side, arguments.batch
    latents = LatentInfo("fp32", (channels, side, side), (0.0,) * channels, (1.0,) * channels, "", "")
    model = _awake(create_generator(SIZES[size], latents, seed=0)).to(device)
    shape = _plain_shape(model.config)
    weights = dict(model.named_parameters())
    noise = torch.randn((count, *latents.shape), generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(count, device=device) % model.config.num_classes
    batch = ClassBatch(noise, labels, ("",) * count, seed=2)
    objective = ClassObjective(model, ClassFlowConfig(), start="")

    def plain(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(x),), t, device=device)
        return plain_velocity(weights, shape, x, times, labels).float()

    with torch.no_grad():
        ours, theirs = model(noise, torch.full((count,), 0.4, device=device), labels), plain(noise, 0.4)
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference < TOLERANCE[precision], f"velocities differ by {difference:.1e}"

    def train_ours() -> None:
        model.zero_grad(set_to_none=True)
        objective.loss(batch, 0).loss_sum.backward()

    def train_plain() -> None:
        model.zero_grad(set_to_none=True)
        plain(noise, 0.4).square().mean().backward()

    parameters = sum(p.numel() for p in model.parameters())
    work = training_flops(model.config, latents.shape, 1)
    print(f"{size}: {parameters:,} parameters, {work:.3g} FLOP an image and training step")
    for warm_up in (train_ours, train_plain):
        warm_up()
    _compare("training step", train_ours, train_plain, count, arguments.repeats, device)
    drawings: list[tuple[Solver, int]] = [("euler", steps) for steps in arguments.steps]
    drawings += [("heun", steps) for steps in arguments.heun_steps]
    for solver, steps in drawings:
        _compare_drawing(model, plain, solver, steps, labels, arguments.repeats, device)


def _compare_drawing(
    model: ClassGenerator,
    plain: Callable[[Tensor, float], Tensor],
    solver: Solver,
    steps: int,
    labels: Tensor,
    repeats: int,
    device: torch.device,
) -> None:
    count, seeds = len(labels), list(range(len(labels)))
    shift = resolve_shift("auto", model.latents.shape)

    @torch.no_grad()
    def ours(num_steps: int) -> None:
        sampling = ClassSamplingConfig(num_steps=num_steps, solver=solver, batch_images=count)
        sample_class_latents(model, labels.tolist(), seeds, sampling)

    @torch.no_grad()
    def theirs(num_steps: int) -> None:
        noise = draw_noise(model.latents.shape, seeds).to(device)
        integrate(plain, noise, sampling_times(num_steps, shift), solver)

    for warm_up in (ours, theirs):
        warm_up(2)
    drawing = f"drawing, {solver} {steps}"
    _compare(drawing, partial(ours, steps), partial(theirs, steps), count, repeats, device)


def _compare(
    name: str,
    ours: Callable[[], None],
    plain: Callable[[], None],
    count: int,
    repeats: int,
    device: torch.device,
) -> None:
    """Times both in turns, so that other work on the machine slows both. Both have run before."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        for key, run in (("ours", ours), ("plain", plain)):
            begin = _now(device)
            run()
            seconds[key].append(_now(device) - begin)
    rates = {key: count / statistics.median(values) for key, values in seconds.items()}
    print(
        f"  {name:19s} ours {rates['ours']:8.2f} images/s, plain {rates['plain']:8.2f}, "
        f"ratio {rates['ours'] / rates['plain']:.2f}",
        flush=True,
    )


def _now(device: torch.device) -> float:
    """Seconds: CPU time of all threads, which other processes hardly lengthen; wall time on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _awake(model: ClassGenerator) -> ClassGenerator:
    """The model moved away from its start, where every block is the identity and velocities are 0."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def _plain_shape(config: DitConfig) -> PlainShape:
    head = config.head
    if head is None:
        return PlainShape(config.num_layers, config.num_heads, config.patch)
    return PlainShape(config.num_layers, config.num_heads, config.patch, head.num_layers, head.num_heads)


if __name__ == "__main__":
    main()
