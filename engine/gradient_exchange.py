"""Gradients of bf16 weights under ZeRO-1, summed in fp32 as they come and sent to their owners in the last backward.

DeepSpeed's BF16_Optimizer adds through an fp32 copy of every gradient and clears the sums after each step. After the
last backward pass it all-reduces all sums, and every rank computes the norm of all of them. docs/recipes.md and
benchmarks/exchange.py state what the exchange here saves. Members not defined here are private to DeepSpeed 0.19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from engine import layout

BUCKET_ELEMENTS = 25_000_000
"""Size of one exchange: 100 MB, which a network carries at its full rate. No backward pass hides the last exchange."""
NORM_ELEMENTS = 1 << 20
"""Size of one partial norm: on a CPU, a longer fp32 sum of squares is wrong by about a per cent."""


@dataclass(eq=False)
class _Bucket:
    """A range of the gradient sums that lies in one rank's shard."""

    sums: Tensor
    owner: int | None
    """The rank that needs the total; None: all ranks need it."""
    num_parameters: int
    missing: int
    """Number of parameters whose gradient of this backward pass has not come yet."""


class ShardedSums(BF16_Optimizer):  # type: ignore[misc]
    """BF16_Optimizer with its own exchange of fp32 gradients. A step waits for the device once, for the norm."""

    _buckets: list[_Bucket]
    """Buckets in the order of their exchange, which is equal on every rank."""
    _buckets_of: list[list[list[_Bucket]]]
    """The buckets of a parameter, by its group and its position in the group."""

    @classmethod
    def take_over(cls, optimizer: BF16_Optimizer) -> None:
        """Gives an unused `optimizer` these methods. It must have `immediate_grad_update` on."""
        assert type(optimizer) is BF16_Optimizer and optimizer.immediate_grad_update
        optimizer.__class__ = cls
        optimizer._plan_exchange()

    def _plan_exchange(self) -> None:
        """Cuts the shards into buckets. Gradients come roughly in the reverse of the order in which parameters were
        registered, so the bucket whose first parameter was registered last is exchanged first.
        """
        self._world = comm.get_world_size(self.dp_process_group)
        self._works: list[Any] = []
        self._num_begun = 0
        self._buckets_of = [[[] for _ in group] for group in self.bf16_groups]
        registered = {id(parameter): number for number, parameter in enumerate(self.param_names)}
        placed: list[tuple[int, _Bucket]] = []
        for index, group in enumerate(self.bf16_groups):
            sizes = [(str(number), parameter.numel()) for number, parameter in enumerate(group)]
            shard = self.fp32_groups_flat_partition[index].numel()
            for begin in range(0, shard * self._world, shard):
                for start in range(begin, begin + shard, BUCKET_ELEMENTS):
                    length = min(BUCKET_ELEMENTS, begin + shard - start)
                    inside = [int(segment.parameter) for segment in layout.window(sizes, start, length)]
                    if not inside:  # padding
                        continue
                    sums = self.fp32_groups_gradients_flat[index].narrow(0, start, length)
                    owner = None if self._is_whole(index) else begin // shard
                    bucket = _Bucket(sums, owner, len(inside), len(inside))
                    placed.append((min(registered[id(group[number])] for number in inside), bucket))
                    for number in inside:
                        self._buckets_of[index][number].append(bucket)
        self._buckets = [bucket for _, bucket in sorted(placed, key=lambda pair: -pair[0])]

    def _is_whole(self, group_index: int) -> bool:
        """Whether every rank needs the group's gradients: Muon orthogonalises whole matrices."""
        return bool(self.optimizer.param_groups[group_index].get("use_muon", False))

    @torch.no_grad()
    def accumulate_hp_grads_and_remove_lp(
        self, lp_param: torch.nn.Parameter, group_idx: int, param_idx: int
    ) -> None:
        """DeepSpeed's hook behind a parameter's gradient. One kernel adds it; a step's first one replaces the sum."""
        # Only DeepSpeed's prologue of a backward pass tells whether this is the last pass: deepspeed_engine.Forward.
        assert self._backward_active_depth and lp_param.grad is not None
        sums = self.fp32_groups_gradients[group_idx][param_idx]
        if self.fp32_groups_has_gradients[group_idx][param_idx]:
            sums.add_(lp_param.grad.view(-1))
        else:
            sums.copy_(lp_param.grad.view(-1))
            self.fp32_groups_has_gradients[group_idx][param_idx] = True
        lp_param.grad = None
        if self.is_gradient_accumulation_boundary():
            for bucket in self._buckets_of[group_idx][param_idx]:
                assert bucket.missing, "a parameter got two gradients in one backward pass"
                bucket.missing -= 1
            self._exchange(only_ready=True)

    def _exchange(self, *, only_ready: bool) -> None:
        """Starts the exchange of the next buckets in order: of all, or (`only_ready`) up to the first unready one."""
        while self._num_begun < len(self._buckets):
            bucket = self._buckets[self._num_begun]
            if only_ready and bucket.missing:
                return
            self._num_begun += 1
            if self._world == 1:
                continue
            group = self.dp_process_group
            if bucket.owner is None:
                self._works.append(comm.all_reduce(bucket.sums, group=group, async_op=True))
            else:
                self._works.append(comm.reduce(bucket.sums, bucket.owner, group=group, async_op=True))

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool) -> None:
        """DeepSpeed calls this after the last backward pass; afterwards each shard has the mean over the ranks.

        A parameter without a gradient on this rank counts as zero.
        """
        for sums, has_gradients in zip(
            self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True
        ):
            for each, has_gradient in zip(sums, has_gradients, strict=True):
                if not has_gradient:
                    each.zero_()
        self._exchange(only_ready=False)
        for work in self._works:
            work.wait()
        self._works.clear()
        self._num_begun = 0
        for bucket in self._buckets:
            bucket.missing = bucket.num_parameters
        if self._world > 1:
            for index, shard in enumerate(self.fp32_groups_gradient_flat_partition):
                mean = self.fp32_groups_gradients_flat[index] if self._is_whole(index) else shard
                mean.mul_(1 / self._world)

    def clear_hp_grads(self) -> None:
        """Lets the next gradients replace the sums: writing zeros would take as long as adding a gradient."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """DeepSpeed's step, but the norm is computed from the shards. DeepSpeed's engine clears the sums afterwards."""
        shards = self.fp32_groups_gradient_flat_partition
        pieces = [piece for shard in shards for piece in shard.split(NORM_ELEMENTS)]
        squares = torch.stack(torch._foreach_norm(pieces)).square().sum()
        comm.all_reduce(squares, group=self.dp_process_group)
        norm = math.sqrt(float(squares))  # non-finite on all ranks as soon as one gradient is
        self.overflow = not math.isfinite(norm)
        self._global_grad_norm = math.inf if self.overflow else norm
        if self.overflow:
            return
        if 0 < self.clip_grad < norm:
            torch._foreach_mul_(shards, self.clip_grad / (norm + 1e-6))
        for weights, shard in zip(self.fp32_groups_flat_partition, shards, strict=True):
            weights.grad = shard
        if self._uses_muon:
            self._prepare_muon_updates()
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()  # the state exists only now
        self.update_lp_params()
