"""Memory in bytes: DeepSpeed's states on a rank, by arithmetic; the peak of a piece of work, by counting its tensors.

`StateBytes` follows DeepSpeed 0.19 as engine/deepspeed_engine.py configures it. A test compares it with the memory
really allocated.
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
"""DeepSpeed's stage3_max_live_parameters: parameters that ZeRO-3 keeps gathered between forward and backward pass."""
CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
ASKED = re.compile(r"tried to allocate ([\d.,]+ ?\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one engine's states on one rank, without activations.

    ZeRO (Rajbhandari et al. 2020, section 3): stage 1 shards masters and moments, 2 also gradients, 3 also weights.
    """

    weights: float
    optimizer: float
    """fp32 masters and two moments; an upper bound for Muon, whose matrices have one moment."""
    ema: float
    gradients: float
    """Gradients at the end of a backward pass."""
    buffers: float
    """Memory beside the gradients: the bucket that is reduced, its copies, and weights that ZeRO-3 has gathered."""
    stepping: float
    """Memory that replaces gradients and buffers while the optimizer steps."""

    @classmethod
    def of(
        cls, config: EngineConfig, num_trained: int, num_frozen: int, num_ranks: int, *, accumulates: bool
    ) -> StateBytes:
        """The arithmetic for one config. `accumulates`: whether a rank has several packs a step."""
        is_half, stage = config.precision == "bf16", config.zero_stage
        weight = 2 if is_half else FP32_BYTES
        share = num_trained / num_ranks  # of whatever the stage shards
        filled = min(num_trained, BUCKET_ELEMENTS)
        gradients, buffers, stepping = FP32_BYTES * share, 0.0, 2 * FP32_BYTES * share
        if stage == 1 and is_half:  # fp32 sums stay; a gradient is freed once it is added
            gradients = stepping = FP32_BYTES * num_trained
        elif stage == 1:
            gradients, buffers = FP32_BYTES * num_trained, FP32_BYTES * BUCKET_ELEMENTS
        elif (
            stage == 2 and is_half
        ):  # a rank's part of a full bucket is copied, and cast to fp32 to be reduced
            buffers = weight * BUCKET_ELEMENTS + (weight + FP32_BYTES) * filled / num_ranks
            stepping = FP32_BYTES * share
        elif stage == 2:
            gradients *= 2 if accumulates else 1  # the sum so far, and this pack's gradients
            buffers = FP32_BYTES * BUCKET_ELEMENTS
        else:
            bucket = FP32_BYTES * BUCKET_ELEMENTS
            gathered = min(num_trained + num_frozen, LIVE_PARAMETERS) if num_ranks > 1 else 0
            # Finished layers free their weights, while their gradients fill the bucket and two copies of it.
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
        """Bytes held during a whole step: weights, optimizer and averages."""
        return self.weights + self.optimizer + self.ema

    def __add__(self, other: StateBytes) -> StateBytes:
        """The sum for two engines on one rank."""
        return StateBytes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def peak(self, activations: float) -> float:
        """Bytes at the fullest moment of a step: the end of a backward pass, or the optimizer's step.

        An upper bound: activations shrink during a backward pass.
        """
        return self.lasting + max(self.gradients + self.buffers + activations, self.stepping)


class TensorBytes(TorchDispatchMode):
    """Counts bytes of all tensors made inside (present and peak) and FLOPs of their products; fake tensors count, too.

    Tensors in `known` are not counted. The count is an upper bound if a library reuses memory without a tensor.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now, self.peak, self.flops = 0, 0, 0.0

    def reset_peak(self) -> None:
        """Starts a new peak at the present number of bytes."""
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
    """Resets the process's resident peak. Returns whether the kernel did so (Linux; else it is since the start)."""
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
    """The size of the allocation that found the memory full, in words; None: `error` is of another kind."""
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
