"""Bytes: what DeepSpeed holds on a rank, by arithmetic, and what a piece of work holds at its fullest, counted.

`StateBytes` follows DeepSpeed 0.19 as engine/deepspeed_engine.py configures it. A test compares it with what is
allocated.
"""

from __future__ import annotations

import re
import resource
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.deepspeed_engine import BUCKET_ELEMENTS
from engine.engine_config import EngineConfig

FP32_BYTES = 4
MOMENTS = 2
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what ZeRO-3 leaves gathered between forward and backward pass."""
CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
ASKED = re.compile(r"tried to allocate ([\d.,]+ ?\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class StateBytes:
    """Of one engine on one rank, without activations.

    ZeRO (Rajbhandari et al. 2020, section 3): stage 1 shards masters and moments, 2 also gradients, 3 also weights.
    """

    weights: float
    optimizer: float
    """fp32 masters and two moments (Muon has one for its matrices: for it an upper bound)."""
    ema: float
    gradients: float
    """At the end of a backward pass."""
    buffers: float
    """Beside them: the bucket that is reduced, its copies, and weights that ZeRO-3 has gathered."""
    stepping: float
    """In place of gradients and buffers while the optimizer steps."""

    @classmethod
    def of(
        cls, config: EngineConfig, num_trained: int, num_frozen: int, num_ranks: int, *, accumulates: bool
    ) -> StateBytes:
        """`accumulates`: a rank has several packs a step."""
        is_half, stage = config.precision == "bf16", config.zero_stage
        weight = 2 if is_half else FP32_BYTES
        share = num_trained / num_ranks  # of a stage that shards
        filled = min(num_trained, BUCKET_ELEMENTS)
        gradients, buffers, stepping = FP32_BYTES * share, 0.0, 2 * FP32_BYTES * share
        if stage == 1 and is_half:  # sums in fp32, which stay; a gradient goes as soon as it has been added
            gradients = stepping = FP32_BYTES * num_trained
        elif stage == 1:
            gradients, buffers = FP32_BYTES * num_trained, FP32_BYTES * BUCKET_ELEMENTS
        elif (
            stage == 2 and is_half
        ):  # of a full bucket a rank's part is copied, and cast to fp32 to be reduced
            buffers = weight * BUCKET_ELEMENTS + (weight + FP32_BYTES) * filled / num_ranks
            stepping = FP32_BYTES * share
        elif stage == 2:
            gradients *= 2 if accumulates else 1  # the sum so far, and this pack's
            buffers = FP32_BYTES * BUCKET_ELEMENTS
        else:
            bucket = FP32_BYTES * BUCKET_ELEMENTS
            gathered = min(num_trained + num_frozen, LIVE_PARAMETERS) if num_ranks > 1 else 0
            # Layers that are done give their weights back, while their gradients fill the bucket and two copies of it.
            reducing = 2 * FP32_BYTES * filled + weight * max(gathered - filled, 0)
            buffers = bucket + max(weight * gathered, reducing)
            stepping = bucket + 2 * FP32_BYTES * share
        return cls(
            weights=weight * (num_trained + num_frozen) / (num_ranks if stage == 3 else 1),
            optimizer=(1 + MOMENTS) * FP32_BYTES * share,
            ema=FP32_BYTES * share * len(config.ema_decays),
            gradients=gradients,
            buffers=buffers,
            stepping=stepping,
        )

    @property
    def lasting(self) -> float:
        """What is there all the time."""
        return self.weights + self.optimizer + self.ema

    def __add__(self, other: StateBytes) -> StateBytes:
        """Of two engines on the same rank."""
        return StateBytes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def peak(self, activations: float) -> float:
        """At the fullest moment of a step: the end of a backward pass (a bound, activations shrink on the way), or the
        optimizer's step.
        """
        return self.lasting + max(self.gradients + self.buffers + activations, self.stepping)


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors made inside, now and at the most, and FLOPs of their products; works on fake tensors, too.

    What `known` holds is not counted. An upper bound where a library hands memory on without a tensor.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now, self.peak, self.flops = 0, 0, 0.0

    def reset_peak(self) -> None:
        """The most from now on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self._known:
            return
        num_bytes = storage.nbytes()
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def reset_resident_peak() -> bool:
    """Whether the kernel forgot the process's highest resident memory (Linux; else it counts since the start)."""
    try:
        CLEAR_PEAK.write_text("5")
    except OSError:
        return False
    return True


def resident_peak_bytes() -> int:
    """The process's highest resident memory since the last reset, or since its start."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(line.split()[1]) * 1024


def asked_for(error: BaseException) -> str | None:
    """How much an allocator whose memory is full was asked for, in words; None: another kind of error."""
    text = str(error)
    is_cpu = "DefaultCPUAllocator" in text
    if not (is_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
        return None
    found = ASKED.search(text)
    if found is None:
        return "the allocator gave up"
    asked = found[1]
    if is_cpu:
        asked = f"{int(asked.split()[0].replace(',', '')) / 2**30:.2f} GiB"
    return f"{asked} more were asked for"
