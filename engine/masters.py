"""DeepSpeed engines: how they are made, and the fp32 master shards inside them.

The attributes read here are private to DeepSpeed 0.19; setup.py pins the series and a test covers each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.schedule import OptimizerConfig, build_optimizer

Precision = Literal["fp32", "bf16_autocast", "bf16"]
BUCKET_ELEMENTS = 100_000_000
CHECKSUM_CHUNK = 1 << 22  # elements; the products of a chunk take 32 MB


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The arithmetic of a forward pass. bf16 weights need it too: norms, losses and inputs stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


class Forward(nn.Module):
    """What DeepSpeed wraps: `module`'s parameters, and `loss` as the forward pass, under autocast if asked."""

    def __init__(self, module: nn.Module, loss: Callable[[Any, int], Any], precision: Precision) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._precision = precision

    def forward(self, batch: Any, step: int) -> Any:
        """The objective's LossOutput."""
        with autocast(self._precision, next(self.module.parameters()).device):
            return self._loss(batch, step)


def build_engine(
    forward: Forward,
    config: OptimizerConfig,
    *,
    zero_stage: int,
    precision: Precision,
    accumulation_steps: int,
) -> Any:
    """A DeepSpeed engine around `forward`; every default that surprised somebody is written out."""
    import deepspeed

    if config.name == "muon" and not torch.cuda.is_available():
        # DeepSpeed compiles its Muon kernels: on a CPU that needs a C++ compiler, takes minutes and gains nothing.
        torch.compiler.set_stance("force_eager")
    engine, _, _, _ = deepspeed.initialize(
        model=forward,
        optimizer=build_optimizer(config, forward),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": config.grad_clip,
            "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": zero_stage,
                "overlap_comm": False,
                # ZeRO-3 orthogonalises whole gradients, so for Muon it must reduce them whole.
                "reduce_scatter": not (config.name == "muon" and zero_stage == 3),
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
            },
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"tag_validation": "Fail"},
            "steps_per_print": 10**9,
        },
    )
    return engine


def shards(engine: Any) -> list[Tensor]:
    """This rank's fp32 master shards, one flat tensor per parameter group (ZeRO 1, 2, 3)."""
    optimizer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1/2
        "fp32_groups_flat_partition",  # bf16 with fp32 gradient accumulation, ZeRO-1
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"no master shards known in {type(optimizer).__name__}")


@torch.no_grad()
def checksum(module: nn.Module) -> tuple[int, int]:
    """Two integers over the bits of every parameter, computed where the parameters are.

    The second one weighs each value by its place. Equal weights give equal numbers; that different weights give
    different ones is as good as certain, but no proof.
    """
    total = placed = torch.zeros((), dtype=torch.int64)
    for parameter in module.parameters():
        integers = torch.int32 if parameter.element_size() == 4 else torch.int16
        for chunk in torch.split(parameter.detach().flatten().view(integers), CHECKSUM_CHUNK):
            place = torch.arange(1, len(chunk) + 1, device=chunk.device)
            total = total.to(chunk.device) + chunk.sum(dtype=torch.int64)
            placed = placed.to(chunk.device) * 31 + (chunk * place).sum()
    return int(total), int(placed)


def push(engine: Any) -> None:
    """Makes the model's parameters equal to the master shards (after these were written to)."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.parameter_offload.partition_all_parameters()
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@contextmanager
def swapped(engine: Any, replacement: list[Tensor]) -> Iterator[None]:
    """Inside, the model has the weights of `replacement` (shards as in `shards`); afterwards its own, bit for bit."""
    own = [shard.detach().clone() for shard in shards(engine)]
    try:
        _write(engine, replacement)
        yield
    finally:
        _write(engine, own)


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Inside, every rank sees whole parameters (a no-op below ZeRO-3)."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def _write(engine: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        for shard, value in zip(shards(engine), values, strict=True):
            shard.copy_(value)
    push(engine)
