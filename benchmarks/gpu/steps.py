"""The loop's own step (engine.step.Stepper) in one process, on DeepSpeed; without DeepSpeed on a plain engine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from base.objective import Batch, Objective
from engine import deepspeed_engine, distributed
from engine.distributed import Ranks
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.metric_window import Window
from engine.schedule import build_optimizer
from engine.spans import Spans
from engine.step import Stepper

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
HOW_TO_BRING_DEEPSPEED = (
    "deepspeed is not installed: the steps below ran on fp32 masters and torch's fused AdamW in its place. Where pip "
    "works: `DS_BUILD_OPS=0 pip wheel --no-deps deepspeed`, a wheel of pure Python; bring it, and `pip install` it here"
)


class PlainEngine:
    """The part of a DeepSpeed engine that Stepper uses, on one device: fp32 masters and sums, torch's fused AdamW."""

    skipped_steps = 0

    def __init__(
        self,
        forward: deepspeed_engine.Forward,
        config: OptimizerConfig,
        *,
        precision: deepspeed_engine.Precision,
        accumulation_steps: int,
        **_of_ranks: Any,
    ) -> None:
        self.module = forward.bfloat16() if precision == "bf16" else forward
        self._clip, self._num_packs, self._pack = config.grad_clip, accumulation_steps, 0
        self.optimizer = build_optimizer(config, forward)
        self._weights: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._masters = [weight.detach().float().clone() for weight in self._weights]
        remaining = iter(self._masters)
        for group in self.optimizer.param_groups:
            group["params"] = [next(remaining) for _ in group["params"]]
        for master in self._masters:
            master.grad = torch.zeros_like(master)

    def __call__(self, batch: Batch, step: int) -> Any:
        """Runs the forward pass."""
        return self.module(batch, step)

    def backward(self, loss: Tensor, **_scaling: Any) -> None:
        """Adds the gradients of this pack to the sums."""
        loss.backward()  # type: ignore[no-untyped-call]
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is not None:
                assert master.grad is not None
                master.grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Runs the optimizer after the last pack of a step."""
        self._pack += 1
        if self._pack % self._num_packs:
            return
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self.optimizer.step()
        torch._foreach_copy_(self._weights, self._masters)
        for master in self._masters:
            assert master.grad is not None
            master.grad.zero_()

    def destroy(self) -> None:
        """Does nothing; DeepSpeed's engines have this method."""


def start() -> Ranks:
    """The ranks: this process alone."""
    if HAS_DEEPSPEED:
        return distributed.start()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}.items():
        os.environ.setdefault(name, value)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    return Ranks(0, 1, device, dist.new_group(backend="gloo"))


@contextlib.contextmanager
def stepping(
    objective: Objective, config: EngineConfig, ranks: Ranks, num_packs: int
) -> Iterator[Callable[[Sequence[Batch], int], None]]:
    """Yields a function that takes one step of `num_packs` packs: (packs on the device, number of the step)."""
    objective.to(ranks.device)
    plain = (
        contextlib.nullcontext()
        if HAS_DEEPSPEED
        else mock.patch.object(deepspeed_engine, "build_engine", PlainEngine)
    )
    with plain:
        stepper = Stepper(objective, config, ranks, Spans(ranks.device), num_packs)
    window = Window(ranks)

    def take(packs: Sequence[Batch], step: int) -> None:
        outcome = stepper.take(packs, step, window, lambda _loss: False)
        assert outcome.is_taken, "the gradients were not finite"

    try:
        yield take
    finally:
        for engine in stepper.engines.values():
            engine.destroy()
