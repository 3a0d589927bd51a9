"""The mixture of transformers against two marks, forward and backward, in one run: python -m benchmarks.mot

1. Overhead: ours and Bagel's way (benchmarks/bagel_way.py) on equal weights and packs, both against the floor: the
   time of the model's matrix products alone at these sizes. All layers are complete in all three.
   Target: 1.08 x the floor in fp32.
2. Less work: the comparison with the last layer's dead computations skipped and 4 noise draws sharing one text prefix,
   in images a second. Target: 1.25 x Bagel's way at 100 text and 256 image tokens.

bf16 (`--dtypes bfloat16`) is for devices that have it: on a CPU without it one product takes seconds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks import bagel_way
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from evaluation.environment import machine, versions
from generator.attention import planned_attention
from generator.config import MotConfig
from generator.mot import Mot, init_weights
from generator.qwen import QWEN2_5_0_5B

TEXT_TOKENS, SIDE, NUM_IMAGES, DRAWS = 100, 16, 4, 4
GRID_TOKENS = SIDE * SIDE
BAGEL = "Bagel's way"
Step = Callable[[], Tensor]


def main() -> None:
    """Prints every ratio beside its target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=3, help="of Qwen2.5-0.5B's shape")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    arguments = parser.parse_args()
    print(f"machine: {machine()}\nversions: {versions()}")
    print(f"{arguments.layers} layers of Qwen2.5-0.5B's shape, {arguments.device}, both experts")
    for name in arguments.dtypes:
        _report(arguments.layers, torch.device(arguments.device), getattr(torch, name), arguments.repeats)


def _report(num_layers: int, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
    config = dataclasses.replace(QWEN2_5_0_5B, vocab_size=8, num_layers=num_layers)
    model = Mot(config)
    init_weights(model, torch.Generator().manual_seed(0))
    model = model.to(device, dtype)
    inputs = torch.randn(2, 2048, config.width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    single, shared = _pack(NUM_IMAGES, 1).to(device), _pack(NUM_IMAGES // DRAWS, DRAWS).to(device)
    sequence = _to(bagel_way.sequenced([(TEXT_TOKENS, 1)] * NUM_IMAGES, GRID_TOKENS), device)

    compiled = copy.deepcopy(model)
    compiled.compile_layers()

    def ours(batch: PackedBatch, complete: bool, model: Mot = model) -> Step:
        x_UD, x_GD = inputs[0, : len(batch.text_ids)], inputs[1, : len(batch.latents)]
        attention = planned_attention(batch.attention, "auto")

        def run() -> Tensor:
            text, out = model(x_UD, x_GD, batch.rope_positions, attention, batch.num_loss_tokens, complete)
            # Bagel's scatter sends zeros back through the text's last outputs; a complete pass must include that work.
            return out if text is None else out + 0 * text.sum()

        return run

    def bagel() -> Tensor:
        x_UD, x_GD = inputs[0, : len(single.text_ids)], inputs[1, : len(single.latents)]
        # Our order stores the special tokens of all images after the texts; Bagel's sequence has them in place.
        order = torch.argsort(_text_places(device))
        return bagel_way.forward(model, x_UD[order], x_GD, sequence)

    difference = (ours(single, True)().float() - bagel().float()).abs().max().item()
    size = bagel().float().abs().max().item()
    floor = _Floor(config, single, device, dtype)
    name = str(dtype).removeprefix("torch.")
    print(
        f"{name}: {single.attention.num_tokens} tokens; outputs differ by {difference / size:.1e} of the largest"
    )
    times = _time(
        {
            "floor": floor.run,
            BAGEL: lambda: _train(model, bagel),
            "ours, complete": lambda: _train(model, ours(single, True)),
            "compiled, complete": lambda: _train(compiled, ours(single, True, compiled)),
            "ours": lambda: _train(model, ours(single, False)),
            f"ours, {DRAWS} draws": lambda: _train(model, ours(shared, False)),
            f"compiled, {DRAWS} draws": lambda: _train(compiled, ours(shared, False, compiled)),
        },
        repeats,
        device,
    )
    for what, seconds in times.items():
        rate = f"{NUM_IMAGES / seconds:6.2f} images/s" if what != "floor" else ""
        ratio = f"{seconds / times['floor']:.3f} x floor, {times[BAGEL] / seconds:.3f} x"
        print(f"{name}: {what:18s} {seconds * 1000:8.1f} ms  {ratio} Bagel's images/s  {rate}")


def _train(model: Mot, step: Step) -> None:
    model.zero_grad(set_to_none=True)
    out = step()
    out.backward(torch.ones_like(out))


class _Floor:
    """The matrix products of one complete forward and backward pass at the pack's sizes, and nothing else."""

    def __init__(
        self, config: MotConfig, batch: PackedBatch, device: torch.device, dtype: torch.dtype
    ) -> None:
        width, heads, kv = (
            config.width,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        linear = [
            (width, heads),
            (width, kv),
            (width, kv),
            (heads, width),
            (width, config.mlp_width),
            (width, config.mlp_width),
            (config.mlp_width, width),
        ]
        self._layers = config.num_layers
        self._linear = []
        for tokens in (len(batch.text_ids), len(batch.latents)):
            for inner, outer in linear:
                shapes = ((tokens, inner), (inner, outer), (tokens, outer))
                self._linear.append([torch.randn(shape, device=device).to(dtype) for shape in shapes])
        length, size = TEXT_TOKENS, config.head_dim
        self._attention = []
        for queries, keys in ((length, length), (GRID_TOKENS + 2, length + GRID_TOKENS + 2)):
            shapes = ((queries, size), (keys, size), (queries, keys))
            self._attention.append(
                [torch.randn(NUM_IMAGES * config.num_heads, *s, device=device).to(dtype) for s in shapes]
            )

    def run(self) -> None:
        """Runs y = x w, dx = dy w', dw = x' dy; scores, output, and their four gradients."""
        for _ in range(self._layers):
            for x, w, y in self._linear:
                torch.mm(x, w)
                torch.mm(y, w.T)
                torch.mm(x.T, y)
            for q, k, p in self._attention:
                for _ in range(2):
                    torch.bmm(q, k.mT)
                    torch.bmm(p, k)
                    torch.bmm(p.mT, q)


def _pack(num_samples: int, draws: int) -> PackedBatch:
    image = ImageSplit(torch.zeros(1, SIDE, SIDE), noisy=True)
    return build_packed_batch(
        [[TextSplit([0] * TEXT_TOKENS), *[image] * draws] for _ in range(num_samples)],
        vision_start_id=1,
        vision_end_id=2,
        max_side=SIDE,
        seed=0,
        sample_ids=["sample"] * num_samples,
    )


def _text_places(device: torch.device) -> Tensor:
    """Index of each understanding token of our order among the sequence's understanding tokens."""
    per_sample = TEXT_TOKENS + 2
    texts = [s * per_sample + i for s in range(NUM_IMAGES) for i in range(TEXT_TOKENS)]
    special = [s * per_sample + TEXT_TOKENS + i for s in range(NUM_IMAGES) for i in range(2)]
    return torch.tensor(texts + special, device=device)


def _to(pack: bagel_way.Sequenced, device: torch.device) -> bagel_way.Sequenced:
    index = (pack.text_index.to(device), pack.latent_index.to(device), pack.positions.to(device))
    return bagel_way.Sequenced(*index, pack.lengths, tuple(mask.to(device) for mask in pack.masks))


def _time(steps: Mapping[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each step, taken in turn: a noisy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            begin_s = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - begin_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
