"""Estimates the seconds of a training step on a GPU, part by part, for --dry-run, recipes and preflight.

Every part is an amount (FLOP, bytes, kernels) divided by a rate. The amounts follow from the config. The table REACHED
holds the rates and their sources. No rate has been measured on this code yet: `make gpu` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.engine_config import EngineConfig
from engine.spans import PEAK_FLOPS
from generator.memory_traffic import ValueBytes

NODE_GPUS = 8
MASTER_BYTES = 4  # sums, masters and each moment are fp32


@dataclass(frozen=True)
class Gpu:
    """A device's rates from its data sheet."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s."""
    memory_bytes_per_s: float
    node_bytes_per_s: float
    """Bandwidth out of one GPU to others of its node."""
    far_bytes_per_s: float
    """Bandwidth out of one GPU to other nodes."""


H100 = Gpu("H100", PEAK_FLOPS["H100"], 3.35e12, 450e9, 50e9)
"""H100 SXM with NVLink 4 and InfiniBand NDR."""


@dataclass(frozen=True)
class Reached:
    """Shares of a device's rates that this code reaches, and the host's costs in seconds."""

    products: float = 0.59
    """Matrix products: 570 to 600 TFLOP/s of an H100's 989 at width 896, from the tiles of their shapes."""
    attention: float = 0.14
    """Useful query-key pairs, both passes. Variable-length kernels execute 1.7 times as many, for heads of width 64."""
    memory: float = 0.85
    """Kernels that only read and write, which reach the rate of copies of large tensors."""
    node: float = 0.73
    """NCCL's all-gather and reduce-scatter inside a node: 330 of 450 GB/s."""
    far: float = 0.8
    """NCCL's all-gather and reduce-scatter between nodes: 40 of 50 GB/s."""
    launch_s: float = 9e-6
    """Host time for launching one kernel, from 18 ms for the 2,000 kernels of a sampling step."""
    pack_s: float = 1e-3
    """Time for starting a pack: copying its tensors to the device, and the first kernels."""


REACHED = Reached()


@dataclass(frozen=True)
class Work:
    """Work of one pack's forward and backward pass."""

    products: float
    """FLOP of matrix products."""
    attention: float
    """FLOP of the query-key pairs that the mask allows."""
    moved: float
    """Bytes that all other kernels read and write (generator/memory_traffic.py)."""
    launches: int

    def times(self, share: float) -> Work:
        """This work times `share`, for example 4/3 for activation checkpointing, which repeats the forward pass."""
        return Work(
            self.products * share, self.attention * share, self.moved * share, round(self.launches * share)
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by named part; the parts add up."""

    packs: dict[str, float] = field(default_factory=dict)
    """Seconds for all packs of a rank."""
    boundary: dict[str, float] = field(default_factory=dict)
    """Seconds once a step, for exchange and optimizer. They do not overlap with computing."""

    @property
    def parts(self) -> dict[str, float]:
        """The parts of packs and boundary."""
        return self.packs | self.boundary

    @property
    def compute_s(self) -> float:
        """Seconds of the packs."""
        return sum(self.packs.values())

    @property
    def exchange_s(self) -> float:
        """Seconds of the boundary."""
        return sum(self.boundary.values())

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
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
    """Time of a rank's step with `num_packs` packs of `work`. `num_trained`: parameters, with the discriminator's."""
    memory = reached.memory * gpu.memory_bytes_per_s
    weight = ValueBytes.of(engine.precision).stream
    casts = (
        2 * (weight + 2) if engine.precision == "bf16_autocast" else 0
    )  # casts a weight to bf16 and its gradient back
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
    # Bytes of a shard: the gradient, clipped; master, both moments and each average in and out; the weight sent.
    shard_bytes = MASTER_BYTES * (3 + 3 * 2 + 3 * len(engine.ema_decays)) + weight
    boundary = {
        "gradients exchanged": num_trained * MASTER_BYTES * out * others / link,
        "weights exchanged": num_trained * weight * back * others / link,
        "gradients scaled, their norm, zeroed": share * MASTER_BYTES * (2 + 1 + 1) / memory,
        "optimizer and averages": share * shard_bytes / memory,
    }
    return StepTime(packs, boundary)


def _exchanges(engine: EngineConfig, num_packs: int) -> tuple[float, float]:
    """How often in a step a gradient leaves a GPU, and how often a weight arrives.

    Gradients go only to their owners: once a step (ZeRO-1), or once a pack (ZeRO-2 and 3). ZeRO-3 also fetches the
    weights twice a pack.
    """
    if engine.zero_stage == 1:
        return 1, 1
    return num_packs, 1 if engine.zero_stage == 2 else 2 * num_packs
