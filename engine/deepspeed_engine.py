"""Builds DeepSpeed engines and reads the fp32 master shards inside them.

The attributes read here are private to DeepSpeed 0.19; pyproject.toml pins the series and a test covers each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.objective import LossOutput
from engine import layout
from engine.engine_config import OptimizerConfig, Precision
from engine.layout import Segment, Sizes
from engine.schedule import build_optimizer

BUCKET_ELEMENTS = 100_000_000
STATES = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
"""Optimizer states with one value per parameter value, of AdamW and of Muon."""
CHECKSUM_CHUNK = 1 << 22  # elements; the products of a chunk take 32 MB


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The autocast context of a forward pass. bf16 weights need it too: norms, losses and inputs stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


class Forward(nn.Module):
    """The module that DeepSpeed wraps: `module`'s parameters; its forward pass is `loss`, under autocast if asked."""

    def __init__(
        self, module: nn.Module, loss: Callable[[Any, int], LossOutput], precision: Precision
    ) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._precision = precision

    def forward(self, batch: Any, step: int) -> tuple[dict[str, Tensor], LossOutput]:
        """The sums to differentiate, by the name of their term ('': the main loss), and the whole LossOutput.

        DeepSpeed hooks the tensors that it finds in tuples and dicts; only these hooks tell it that a backward pass
        begins. Under ZeRO-3 it returns replaced tensors: only the tensors returned here may be differentiated.
        """
        with autocast(self._precision, next(self.module.parameters()).device):
            output = self._loss(batch, step)
        return {"": output.loss_sum, **{name: term.loss_sum for name, term in output.further.items()}}, output


def build_engine(
    forward: Forward,
    config: OptimizerConfig,
    *,
    zero_stage: int,
    precision: Precision,
    accumulation_steps: int,
) -> Any:
    """A DeepSpeed engine around `forward`; surprising defaults of DeepSpeed are set explicitly."""
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
            "bf16": {
                "enabled": precision == "bf16",
                "check_grad_overflow": True,
                "immediate_grad_update": True,  # else earlier packs' gradients stay and are added again
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": zero_stage,
                "overlap_comm": False,
                # ZeRO-3 orthogonalises whole gradients, so for Muon it must reduce them whole.
                "reduce_scatter": not (config.name == "muon" and zero_stage == 3),
                # Each rank needs its own part of a bucket only; an all-reduce would send twice as much.
                "use_multi_rank_bucket_allreduce": False,
                "reduce_bucket_size": BUCKET_ELEMENTS,
                "allgather_bucket_size": BUCKET_ELEMENTS,
            },
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"tag_validation": "Fail"},
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a pack
        },
    )
    if zero_stage == 1 and precision == "bf16":
        from engine.gradient_exchange import ShardedSums

        ShardedSums.take_over(engine.optimizer)
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


def shapes(engine: Any) -> dict[str, list[int]]:
    """Names and shapes of the trained parameters, as the module names them."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties parameters
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def groups(engine: Any) -> list[Sizes]:
    """The parameters of each entry of `shards`, in the order in which they lie there."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for attribute in (
        "fp16_groups",
        "round_robin_bit16_groups",
        "bf16_groups",
    ):  # ZeRO-3; 1 and 2; 1 with bf16
        if hasattr(optimizer, attribute):
            assert not any(map(any, getattr(optimizer, "round_robin_bit16_padding", [])))
            return [
                [(names[id(p)], getattr(p, "ds_numel", p.numel())) for p in group]
                for group in getattr(optimizer, attribute)
            ]
    raise AssertionError(f"no parameter groups known in {type(optimizer).__name__}")


def segments(engine: Any) -> list[list[Segment]]:
    """Where the values of `shards` belong; what no segment names is padding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if engine.zero_optimization_stage() == 3:
        return [layout.pieces(sizes, rank, world) for sizes in groups(engine)]
    return [
        layout.window(sizes, rank * len(shard), len(shard))
        for sizes, shard in zip(groups(engine), shards(engine), strict=True)
    ]


def momentum_segments(engine: Any) -> list[list[Segment]]:
    """As `segments`, for Muon's momentum: ZeRO-1 and 2 keep the whole momentum of every matrix that a shard touches."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "params_in_partition"):
        return segments(engine)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [
        layout.whole([(names[id(p)], p.numel()) for p in parameters])
        for parameters in optimizer.params_in_partition
    ]


def state_size(engine: Any, index: int, name: str) -> int:
    """Number of elements, padding included, of optimizer state `name` of entry `index` of `shards`."""
    if name == "momentum_buffer" and hasattr(engine.optimizer, "params_in_partition"):
        return layout.covered(momentum_segments(engine)[index])
    return len(shards(engine)[index])


def states(engine: Any) -> list[dict[str, Tensor]]:
    """The optimizer's state tensors (moments; momentum), for each entry of `shards`; empty before the first step."""
    stored = engine.optimizer.optimizer.state
    found = [
        {name: value for name, value in stored.get(shard, {}).items() if name != "step"}
        for shard in shards(engine)
    ]
    for index, state in enumerate(found):
        for name, value in state.items():
            assert name in STATES and value.shape == (state_size(engine, index, name),), (name, value.shape)
    return found


def optimizer_step(engine: Any) -> float | None:
    """AdamW's count of steps, which all groups share; None before the first one."""
    stored = engine.optimizer.optimizer.state
    steps = {float(stored[shard]["step"]) for shard in shards(engine) if "step" in stored.get(shard, {})}
    assert len(steps) <= 1, f"parameter groups stand at different optimizer steps: {steps}"
    return steps.pop() if steps else None


def set_states(engine: Any, index: int, values: dict[str, Tensor], step: float | None) -> None:
    """Makes `values` the optimizer's state of entry `index` of `shards`; `step` is AdamW's count of steps.

    Existing state tensors are overwritten in place: DeepSpeed holds references to them.
    """
    shard = shards(engine)[index]
    stored = engine.optimizer.optimizer.state
    before = dict(stored.get(shard, {}))
    if not before and not values:
        return
    after: dict[str, Tensor] = {}
    for name, value in values.items():
        known = before.get(name)
        after[name] = value if known is None or known.shape != value.shape else known.copy_(value)
    if "exp_avg" in values:
        assert step is not None
        after["step"] = torch.tensor(step, dtype=torch.float32, device=shard.device)
    stored[shard] = after


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's counts of optimizer steps, samples and skipped steps."""
    return {name: int(getattr(engine, name)) for name in ("global_steps", "global_samples", "skipped_steps")}


def set_counters(engine: Any, values: dict[str, int]) -> None:
    """Restores what `counters` returned. The number of ranks may differ: checkpoints lie between optimizer steps."""
    for name, value in values.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def buffers(engine: Any) -> dict[str, Tensor]:
    """The module's persistent buffers, which are equal on every rank."""
    kept = engine.module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}


@torch.no_grad()
def checksum(module: nn.Module) -> tuple[int, int]:
    """Two integers over the bits of every parameter, computed on the parameters' device.

    The second integer weighs each value by its position. Equal weights give equal integers; different weights almost
    certainly give different integers.
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
    """Copies the master shards to the model's parameters. Call it after writing to the shards."""
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
    """Inside, the model has the weights of `replacement` (as `shards` gives them); afterwards its own, bit for bit.

    An exception leaves `replacement` in the model: it ends the run, and the collective that writes weights back could
    wait for ranks that are elsewhere.
    """
    own = [shard.detach().clone() for shard in shards(engine)]
    _write(engine, replacement)
    yield
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


@contextmanager
def collected(engine: Any, is_first: bool) -> Iterator[None]:
    """Inside, the first rank's model has whole parameters in CPU memory, for `state_dict` only.

    Below ZeRO-3 every rank has whole parameters anyway. Under ZeRO-3 the parameters are gathered one by one, so that no
    device and no other rank ever holds more than the largest parameter.
    """
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    parameters = list(engine.module.parameters())
    whole: list[Tensor] = []
    for parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            if is_first:
                whole.append(parameter.detach().to("cpu", copy=True))
    emptied = [parameter.data for parameter in parameters]
    for parameter, values in zip(parameters if is_first else [], whole, strict=True):
        parameter.data = values
    try:
        yield
    finally:
        for parameter, values in zip(parameters, emptied, strict=True):
            parameter.data = values


def _write(engine: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        for shard, value in zip(shards(engine), values, strict=True):
            shard.copy_(value)
    push(engine)
