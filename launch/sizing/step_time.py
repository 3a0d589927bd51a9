"""Seconds of a training step on a GPU, part by part: what --dry-run, recipes and preflight print.

Every part is an amount (FLOP, bytes, kernels) over a rate. The amounts follow from the config; the rates stand in one
table, REACHED, with where each is from. None has been measured on this code yet: `make gpu` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.engine_config import EngineConfig
from engine.spans import PEAK_FLOPS
from generator.traffic import ValueBytes

NODE_GPUS = 8
MASTER_BYTES = 4  # sums, masters and each moment are fp32


@dataclass(frozen=True)
class Gpu:
    """What a device can do, from its data sheet."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP a second."""
    memory_bytes_per_s: float
    node_bytes_per_s: float
    """Out of one GPU to others of its node."""
    far_bytes_per_s: float
    """Out of one GPU to other nodes."""


H100 = Gpu("H100", PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9)
"""SXM, with NVLink 4 and InfiniBand NDR."""


@dataclass(frozen=True)
class Reached:
    """Shares of a device's rates that this code reaches, and what the host costs."""

    products: float = 0.59
    """Matrix products: 570 to 600 TFLOP/s of an H100's 989 at width 896, from the tiles of their shapes."""
    attention: float = 0.14
    """Useful pairs, forward and backward: variable-length kernels execute 1.7 times as many, in heads of 64 columns."""
    memory: float = 0.85
    """Kernels that only read and write, as copies of large tensors reach it."""
    node: float = 0.73
    """NCCL's all-gather and reduce-scatter inside a node: 330 of 450 GB/s."""
    far: float = 0.8
    """The same between nodes: 40 of 50 GB/s."""
    launch_s: float = 9e-6
    """Of the host for one kernel: 18 ms for the 2,000 of a sampling step."""
    pack_s: float = 1e-3
    """A pack's beginning: its tensors' way to the device, the first kernels."""


REACHED = Reached()


@dataclass(frozen=True)
class Work:
    """One pack, forward and backward pass."""

    products: float
    """FLOP."""
    attention: float
    """FLOP of the pairs that the mask allows."""
    moved: float
    """Bytes that everything else reads and writes (generator/traffic.py)."""
    launches: int

    def times(self, share: float) -> Work:
        """So much of it: a checkpointed model runs its forward pass twice."""
        return Work(
            self.products * share, self.attention * share, self.moved * share, round(self.launches * share)
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by named part; they add up."""

    packs: dict[str, float] = field(default_factory=dict)
    """Of all packs of a rank."""
    boundary: dict[str, float] = field(default_factory=dict)
    """Once a step: exchange and optimizer. Nothing of it overlaps with computing."""

    @property
    def parts(self) -> dict[str, float]:
        """All of them."""
        return self.packs | self.boundary

    @property
    def compute_s(self) -> float:
        """Of the packs."""
        return sum(self.packs.values())

    @property
    def exchange_s(self) -> float:
        """Of the boundary."""
        return sum(self.boundary.values())

    @property
    def total_s(self) -> float:
        """Of the step."""
        return sum(self.parts.values())


def step_time(
    work: Work,
    engine: EngineConfig,
    *,
    num_trained: int,
    num_packs: int,
    num_gpus: int,
    gpu: Gpu = H100,
    reached: Reached = REACHED,
) -> StepTime:
    """A rank's step of `num_packs` packs like `work`. `num_trained`: parameters, the discriminator's included."""
    memory = reached.memory * gpu.memory_bytes_per_s
    weight = ValueBytes.of(engine.precision).stream
    casts = (
        2 * (weight + 2) if engine.precision == "bf16_autocast" else 0
    )  # a weight to bf16, its gradient back
    device = {
        "matrix products": work.products / (reached.products * gpu.peak_flops),
        "norms, rotations, SwiGLU, casts": (work.moved + casts * num_trained) / memory,
        "attention": work.attention / (reached.attention * gpu.peak_flops),
        "gradient sums": num_trained * (weight + 2 * MASTER_BYTES) / memory,
    }
    host_s = work.launches * reached.launch_s
    waiting = {"waiting for the host": reached.pack_s + max(0.0, host_s - sum(device.values()))}
    packs = {name: seconds * num_packs for name, seconds in (device | waiting).items()}
    is_near = num_gpus <= NODE_GPUS
    link = reached.node * gpu.node_bytes_per_s if is_near else reached.far * gpu.far_bytes_per_s
    out, back = _exchanges(engine, num_packs)
    others = (num_gpus - 1) / num_gpus
    share = num_trained / num_gpus
    # A shard: gradient, clipped; master, both moments, each average in and out; the weight that is sent.
    shard_bytes = MASTER_BYTES * (3 + 3 * 2 + 3 * len(engine.ema_decays)) + weight
    boundary = {
        "gradients exchanged": num_trained * MASTER_BYTES * out * others / link,
        "weights exchanged": num_trained * weight * back * others / link,
        "gradients scaled, their norm, zeroed": share * MASTER_BYTES * (2 + 1 + 1) / memory,
        "optimizer and averages": share * shard_bytes / memory,
    }
    return StepTime(packs, boundary)


def _exchanges(engine: EngineConfig, num_packs: int) -> tuple[float, float]:
    """How often a gradient leaves a GPU in a step, and a weight comes.

    Gradients go to their owners alone: once a step (ZeRO-1), or of every pack (2, 3). ZeRO-3 also fetches the weights
    twice for each pack.
    """
    if engine.zero_stage == 1:
        return 1, 1
    return num_packs, 1 if engine.zero_stage == 2 else 2 * num_packs
