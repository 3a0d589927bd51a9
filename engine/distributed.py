"""Ranks and the few collectives the loop needs. Nothing outside `engine` talks to torch.distributed."""

from __future__ import annotations

import dataclasses
import datetime
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from base import threads
from engine import job_endings, peers

DEFAULT_TIMEOUT_S = 3600
"""Timeout of the process groups. The watchdog, which names the rank, should act first: engine.hang_timeout_s."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and its collectives on CPU values (a gloo group: no device is synchronised)."""

    rank: int
    world: int
    device: torch.device
    control: Any
    waits: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context entered around every collective: the loop measures with it how long it waits for other ranks."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what only one rank may write."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        with self.waits():
            dist.barrier(group=self.control)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        with self.waits():
            dist.all_reduce(total, group=self.control)
        return [float(value) for value in total]

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a tensor that stays on this rank's device."""
        dist.all_reduce(values)
        return values

    def peak_memory_gib(self) -> float:
        """Peak GiB of the fullest rank: GPU memory allocated since the last call, or resident since the start."""
        if self.device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return float(max(self.gather(peak_bytes / 2**30)))

    def gather(self, value: Any) -> list[Any]:
        """One small picklable value from each rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        with self.waits():
            dist.all_gather_object(values, value, group=self.control)
        return values


def start(timeout_s: int = DEFAULT_TIMEOUT_S, meeting_s: int = peers.MEETING_S) -> Ranks:
    """Joins the process group named by the launcher's environment (alone, if there is none).

    `timeout_s`: the limit of every collective; `meeting_s`: how long ranks wait for each other here.
    Raises UserError, naming the missing ranks: ranks do not find each other.
    """
    use_cuda = torch.cuda.is_available()
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns; our own first line names the device
    import deepspeed

    if not use_cuda:
        # The shared-memory op, which only CPUs use, leaves 69 MB a rank in /dev/shm and is not needed (DeepSpeed 0.19).
        # GPU ranks must not read this table: reading it probes every op with CUDA's compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    threads.share_cores()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    peers.meet(meeting_s)
    deepspeed.init_distributed(
        dist_backend="nccl" if use_cuda else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    ranks.barrier()  # opens the connections
    peers.notice_vanished_peers()
    peers.introduce(ranks.gather(peers.introduction()))
    return ranks


def patient(ranks: Ranks, timeout_s: int) -> Ranks:
    """A copy of `ranks` whose collectives wait up to `timeout_s` for each other. Collective."""
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    return dataclasses.replace(ranks, control=control)


def is_started() -> bool:
    """Whether this process has joined the process group."""
    return dist.is_initialized()


def stop() -> None:
    """Leaves the process group; without this some ranks abort at interpreter exit."""
    if dist.is_initialized():
        job_endings.leave()
        dist.barrier()
        dist.destroy_process_group()
        job_endings.close()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
