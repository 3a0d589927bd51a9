"""Training at the paper's size on one GPU: python -m benchmarks.throughput [--compile] [--kernels flash2 varlen sdpa]

The run of a config (default the paper's text-to-image run: Qwen2.5-0.5B's mixture, bf16, ZeRO-1) takes the loop's
steps on a ring of packs of different lengths: CC12M-LLaVA-Next's captions have 60 to 160 tokens. The GPU gets the
tokens of one of 8 GPUs; smaller packs are more packs a step. Prints tokens and images a second, peak memory, MFU of
useful work, and the share of each class of kernels. Weights and latents are random: nothing is read or downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from base.config import UserError
from benchmarks.gpu import kernels, steps
from benchmarks.gpu.recording import Values, peak_gib, reset_peak, seconds_a_call, synchronise
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from engine.distributed import Ranks
from engine.spans import peak_flops
from evaluation.environment import machine, versions
from generator.attention import choose_backend
from generator.config import Backend
from generator.flash import PACKAGES
from generator.model import Generator
from generator.objective import FlowObjective
from generator.sizing import PackSize, training_flops
from launch.runs.configs import GeneratorRun
from launch.runs.tasks import read_run
from launch.sizing.estimate import PAPER_LATENTS, untrained_latents
from launch.sizing.synthetic import SyntheticText

CONFIG = Path(__file__).parents[1] / "configs" / "generator" / "t2i_cc12m.yaml"
STEP_TOKENS = 49_152  # tokens of a step on a GPU, one of 8
RING = 8
WARM_UP_STEPS = 2
SHORTEST, LONGEST = 60, 160  # tokens of a caption


@dataclass(frozen=True)
class Shape:
    """The run to measure: its config, and how long to measure."""

    config: Path = CONFIG
    overrides: tuple[str, ...] = ()
    latents: tuple[int, int, int] = PAPER_LATENTS
    step_tokens: int = STEP_TOKENS
    at_least_s: float = 1.5
    """Least seconds of each timing."""

    def run(self, pack_tokens: int, *, compiled: bool) -> GeneratorRun:
        """The config with packs of `pack_tokens`, and all packs of a step on one GPU."""
        fields = (f"packing.tokens_per_pack={pack_tokens}", f"flow.compile={str(compiled).lower()}")
        num_packs = f"data.num_streams={max(1, self.step_tokens // pack_tokens)}"
        run = read_run(self.config, (*self.overrides, *fields, num_packs, "generator.init=random"))
        assert isinstance(run, GeneratorRun)
        return run


def usable_kernels(device: torch.device) -> list[Backend]:
    """Kernels that run here in bf16, first the kernel that "auto" chooses."""
    found: list[Backend] = [choose_backend(device, torch.bfloat16)]
    for name in (*PACKAGES, "sdpa"):
        try:
            kernel = choose_backend(device, torch.bfloat16, name)
        except UserError:
            continue
        if kernel not in found:
            found.append(kernel)
    return found


class Training:
    """One run with its engine and its ring of packs; `measure` may run for several kernels."""

    def __init__(self, shape: Shape, run: GeneratorRun, ranks: Ranks) -> None:
        self._device, self._at_least_s = ranks.device, shape.at_least_s
        self.model = random_generator(run, shape.latents, ranks.device)
        text = SyntheticText(run.generator.backbone.vocab_size)
        objective = FlowObjective("t2i", self.model, run.flow, text, start="untrained")
        self._num_packs = run.data.num_streams
        self.ring = packs(
            shape.latents, run.packing.tokens_per_pack, max(RING, self._num_packs), run.packing.max_side
        )
        self.ring = [pack.to(ranks.device) for pack in self.ring]
        self._flops = [training_flops(PackSize.of(p), self.model.config, shape.latents[0]) for p in self.ring]
        self._stepping = steps.stepping(objective, run.engine, ranks, self._num_packs)

    def __enter__(self) -> Training:
        self._take = self._stepping.__enter__()
        self._numbers = itertools.count()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stepping.__exit__(None, None, None)

    def measure(self, kernel: Backend) -> Values:
        """Speed, memory and kernel shares with one attention kernel."""
        self.model.attention_backend = kernel
        begin_s = time.perf_counter()
        for _ in range(WARM_UP_STEPS):
            self.step()
        synchronise(self._device)
        warm_up_s = time.perf_counter() - begin_s
        reset_peak(self._device)
        first = next(self._numbers)
        seconds = seconds_a_call(self.step, self._device, at_least_s=self._at_least_s)
        taken = [self._of(number) for number in range(first + 1, next(self._numbers))]
        tokens, images, flops = (
            float(np.mean(values))
            for values in zip(
                *(
                    (
                        sum(self.ring[i].attention.num_tokens for i in step),
                        sum(self.ring[i].num_targets for i in step),
                        sum(self._flops[i] for i in step),
                    )
                    for step in taken
                ),
                strict=True,
            )
        )
        memory, peak = peak_gib(self._device), peak_flops(self._device)
        shares, unknown = kernels.profiled(self.step, self._device)
        return {
            "kernel": kernel,
            "packs_a_step": self._num_packs,
            "different_packs": len(self.ring),
            "step_s": seconds,
            "tokens_per_s": tokens / seconds,
            "images_per_s": images / seconds,
            "tflops_per_s": flops / seconds / 1e12,
            "mfu": flops / seconds / peak if peak else None,
            "peak_gib": memory,
            "shares": shares,
            "kernels_without_a_class": unknown,
            "warm_up_s": warm_up_s,
        }

    def step(self) -> None:
        """Takes a step on the next packs of the ring."""
        number = next(self._numbers)
        self._take([self.ring[i] for i in self._of(number)], number)

    def _of(self, number: int) -> list[int]:
        return [(number * self._num_packs + i) % len(self.ring) for i in range(self._num_packs)]


def random_generator(run: GeneratorRun, latents: tuple[int, int, int], device: torch.device) -> Generator:
    """A random generator, filled on the device: a CPU takes a minute for as many random numbers."""
    text = SyntheticText(run.generator.backbone.vocab_size)
    model = Generator.uninitialised(run.generator, untrained_latents(latents, text.fingerprint)).to(device)
    fill(model)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Matrices N(0, 0.02^2), norms 1, biases 0: any finite values suffice for timing."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def packs(latents: tuple[int, int, int], num_tokens: int, number: int, max_side: int) -> list[PackedBatch]:
    """`number` packs, each with captions of its own lengths, as full as possible."""
    return list(itertools.islice(_packs(latents, num_tokens, max_side), number))


def _packs(latents: tuple[int, int, int], num_tokens: int, max_side: int) -> Iterator[PackedBatch]:
    generator = np.random.default_rng(0)
    image = ImageSplit(torch.randn(latents, generator=torch.Generator().manual_seed(0)), noisy=True)
    image_tokens = latents[1] * latents[2] + 2
    length = 0
    for seed in itertools.count():
        samples: list[Sequence[TextSplit | ImageSplit]] = []
        left = num_tokens
        while True:
            length = length or int(generator.integers(SHORTEST, LONGEST))
            if samples and length + image_tokens > left:
                break
            samples.append([TextSplit([0] * length), image])
            left, length = left - length - image_tokens, 0
        yield build_packed_batch(
            samples,
            vision_start_id=1,
            vision_end_id=2,
            max_side=max_side,
            seed=seed,
            sample_ids=["sample"] * len(samples),
        )


def main() -> None:
    """Prints one JSON line for each kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--tokens", type=int, default=12_288, help="of a pack")
    parser.add_argument("--kernels", nargs="+", help="default: all that run here")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="fields of the config to change"
    )
    arguments = parser.parse_args()
    print(f"machine: {machine()}\nversions: {versions()}")
    if not steps.HAS_DEEPSPEED:
        print(steps.HOW_TO_BRING_DEEPSPEED)
    ranks = steps.start()
    shape = Shape(arguments.config, tuple(arguments.overrides))
    run = shape.run(arguments.tokens, compiled=arguments.compile)
    with Training(shape, run, ranks) as training:
        for kernel in arguments.kernels or usable_kernels(ranks.device):
            print(json.dumps(training.measure(kernel)))


if __name__ == "__main__":
    main()
