"""How long a training pauses for a checkpoint, saved in the foreground and in the background, on one rank.

A model of --parameters with AdamW's moments and one average is saved --repeats times each way into --folder, on the
disk that a run would use. In the background the training waits for a copy in CPU memory, and at a later step for the
rename. Meanwhile other work goes on at the step's pace; here it is a matrix product, which shows what the writer takes
from it. The measured rates give the pause at the paper's size.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from base.objective import LossOutput
from engine import deepspeed_engine, distributed
from engine.checkpoint import Checkpoints
from engine.ema import Ema
from engine.engine_config import OptimizerConfig
from evaluation.environment import machine, versions

WIDTH = 2048
STATE_BYTES = 16
"""Bytes of a trained parameter's fp32 weight, two moments and average."""
PAPER_PARAMETERS = 853e6
PAPER_RANKS = 8
PAPER_STEP_S = 0.284
"""Seconds of a step: docs/recipes.md, gpus/t2i_8; arithmetic, not a measurement."""
STEPS_BETWEEN = 1000


def main() -> None:
    """Prints pauses, rates and the estimate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary folder")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        measure(int(arguments.parameters), arguments.repeats, folder)
    finally:
        shutil.rmtree(folder)
    distributed.stop()


def measure(num_parameters: int, repeats: int, folder: Path) -> None:
    """Runs the whole benchmark; `folder` holds the checkpoints."""
    ranks = distributed.start()
    model = nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_parameters // WIDTH**2))
    ).to(ranks.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = deepspeed_engine.build_engine(
        deepspeed_engine.Forward(model, lambda batch, step: LossOutput(model(batch).square().mean()), "fp32"),
        OptimizerConfig(lr=1e-4),
        zero_stage=1,
        precision="fp32",
        accumulation_steps=1,
    )
    batch = torch.randn(8, WIDTH, device=ranks.device)
    engine.backward(engine(batch, 0)[0][""])
    engine.step()
    ema = Ema(engine, [0.9999])
    checkpoints = Checkpoints(folder, {"main": engine}, ema, ranks, keep=1, say=print)
    num_bytes = num_parameters * STATE_BYTES
    print(f"machine: {machine()}\nversions: {versions()}")
    print(f"{num_parameters / 1e6:.0f} M parameters, one rank, {num_bytes / 1e9:.2f} GB a checkpoint")

    def save(background: bool) -> float:
        state = {"step": 1, "fingerprints": {}, "data": {}}
        return seconds(lambda: checkpoints.save(state, background=background, required=False))

    waits = [save(background=False) for _ in range(repeats)]
    rate = num_bytes / statistics.median(waits)
    print(f"waiting for the disk: pause {show(waits)}, {rate / 1e9:.2f} GB/s with checksums and fsync")
    alone = statistics.median([seconds(lambda: work(batch)) for _ in range(20)])
    copies, commits, beside, written = [], [], [], []
    save(background=True)  # allocates memory for the copies, once in a run
    checkpoints.finish()
    for _ in range(repeats):
        begin_s = time.monotonic()
        copies.append(save(background=True))
        while not checkpoints.is_written:
            beside.append(seconds(lambda: work(batch)))
        written.append(time.monotonic() - begin_s)
        commits.append(seconds(checkpoints.commit))
    copy_rate = num_bytes / statistics.median(copies)
    print(
        f"in the background: pause for the copy {show(copies)} ({copy_rate / 1e9:.2f} GB/s), for the rename "
        f"{show(commits)}; written after {show(written)}; other work meanwhile takes "
        f"{statistics.median(beside) / alone:.2f} times as long"
    )
    loads = [seconds(lambda: checkpoints.load({})) for _ in range(repeats)]
    print(f"load, checked: {show(loads)}, {num_bytes / statistics.median(loads) / 1e9:.2f} GB/s")
    estimate(rate, copy_rate, statistics.median(commits))


def estimate(rate: float, copy_rate: float, commit_s: float) -> None:
    """Prints the pause of the paper's generator on PAPER_RANKS GPUs at these rates (bytes/s), with one disk."""
    num_bytes = PAPER_PARAMETERS * STATE_BYTES
    between_s = STEPS_BETWEEN * PAPER_STEP_S
    print(
        f"estimate, {PAPER_PARAMETERS / 1e6:.0f} M parameters on {PAPER_RANKS} ranks ({num_bytes / 1e9:.1f} GB, all to "
        f"one disk like this one), a checkpoint every {STEPS_BETWEEN} steps of {PAPER_STEP_S} s (computed):"
    )
    for name, pause_s in (
        ("waiting for the disk", num_bytes / rate),
        ("in the background", num_bytes / PAPER_RANKS / copy_rate + commit_s),
    ):
        print(f"  {name:22s} {pause_s:6.2f} s, {pause_s / between_s:.2%} of the time (goal: below 2%)")
    needed = num_bytes / (0.02 * between_s)
    print(f"  waiting, a disk of {needed / 1e9:.2f} GB/s reaches the goal; in the background, one that")
    print(f"  finishes before the next checkpoint, {num_bytes / between_s / 1e9:.2f} GB/s")


def work(batch: Tensor) -> None:
    """Does some arithmetic and waits for its end."""
    float((batch.new_ones(512, 512) @ batch.new_ones(512, 512)).sum())


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin_s = time.monotonic()
    action()
    return time.monotonic() - begin_s


def show(values: list[float]) -> str:
    """The median, with all values in brackets."""
    return f"{statistics.median(values):.2f} s {[round(value, 2) for value in values]}"


if __name__ == "__main__":
    main()
