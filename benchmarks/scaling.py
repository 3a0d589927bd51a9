"""Time and memory of a training pass against the tokens of a pack: python -m benchmarks.scaling

Samples are text-to-image: 20 to 180 text tokens beside 256 image tokens. A pass is forward and backward through layers
of Qwen2.5-0.5B's shape, with attention within samples only, so time and memory must grow linearly. Memory: bytes kept
for the backward pass (on a GPU the allocator's peak above the weights). Prints the fit and draws results/scaling.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from evaluation.environment import machine, versions
from generator.attention import planned_attention
from generator.mot import Mot, init_weights
from generator.qwen import QWEN2_5_0_5B

SIDE, SHORTEST, LONGEST = 16, 20, 180
PICTURE = Path(__file__).parent / "results" / "scaling.png"


def main() -> None:
    """Prints one line a size, then the sizes' distance from a straight line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8, 12, 16, 24])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    print(f"machine: {machine()}\nversions: {versions()}")
    print(f"{arguments.layers} layers of Qwen2.5-0.5B's shape, {device}, {arguments.dtype}")
    config = dataclasses.replace(QWEN2_5_0_5B, vocab_size=8, num_layers=arguments.layers)
    model = Mot(config)
    init_weights(model, torch.Generator().manual_seed(0))
    model = model.to(device, dtype)
    rows = []
    for num_samples in arguments.samples:
        batch = _pack(num_samples).to(device)
        seconds = min(_seconds(model, batch, dtype) for _ in range(arguments.repeats))
        rows.append((batch.attention.num_tokens, seconds, _kept_bytes(model, batch, dtype) / 2**20))
        print("{:7,} tokens: {:8.3f} s, {:9.1f} MiB".format(*rows[-1]))
    tokens = np.array([row[0] for row in rows], float)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, column, name, unit in zip(panels, (1, 2), ("time", "memory"), ("s", "MiB"), strict=True):
        values = np.array([row[column] for row in rows])
        slope, start = np.polyfit(tokens, values, 1)
        off = np.abs(values - slope * tokens - start).max() / values.max()
        print(
            f"{name}: {slope * 1000:.4g} {unit} per 1,000 tokens, {start:.3g} {unit} at none; "
            f"farthest from the line: {off:.1%} of the largest"
        )
        panel.plot(tokens, slope * tokens + start, color="0.7", label="straight line")
        panel.plot(tokens, values, "o", label="measured")
        panel.set(xlabel="tokens of a pack", ylabel=f"{name}, {unit}", xlim=(0, None), ylim=(0, None))
        panel.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


def _pass(model: Mot, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    width, device = model.config.width, batch.latents.device
    x_UD = torch.ones(len(batch.text_ids), width, device=device, dtype=dtype)
    x_GD = torch.ones(len(batch.latents), width, device=device, dtype=dtype)
    attention = planned_attention(batch.attention, "auto")
    _, out = model(x_UD, x_GD, batch.rope_positions, attention, batch.num_loss_tokens)
    return out.sum()  # type: ignore[no-any-return]


def _seconds(model: Mot, batch: PackedBatch, dtype: torch.dtype) -> float:
    model.zero_grad(set_to_none=False)
    _synchronise(batch)
    begin_s = time.perf_counter()
    _pass(model, batch, dtype).backward()  # type: ignore[no-untyped-call]
    _synchronise(batch)
    return time.perf_counter() - begin_s


def _kept_bytes(model: Mot, batch: PackedBatch, dtype: torch.dtype) -> float:
    if batch.latents.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _pass(model, batch, dtype).backward()  # type: ignore[no-untyped-call]
        return float(torch.cuda.max_memory_allocated() - before)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = _pass(model, batch, dtype)  # held, so that no freed storage is counted for another
    del loss
    return float(sum(kept.values()))


def _pack(num_samples: int) -> PackedBatch:
    lengths = np.linspace(SHORTEST, LONGEST, num_samples).round().astype(int).tolist()
    image = ImageSplit(torch.zeros(1, SIDE, SIDE), noisy=True)
    return build_packed_batch(
        [[TextSplit([0] * length), image] for length in lengths],
        vision_start_id=1,
        vision_end_id=2,
        max_side=SIDE,
        seed=0,
        sample_ids=["sample"] * num_samples,
    )


def _synchronise(batch: PackedBatch) -> None:
    if batch.latents.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
