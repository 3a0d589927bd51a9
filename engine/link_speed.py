"""Measures the connections between ranks for launch/check_nodes.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.distributed import Ranks

SMALL_BYTES = 8
NUM_ROUNDS = 5
NUM_PINGS = 20


@dataclass(frozen=True)
class Link:
    """One direction between two ranks: latency in seconds one way, bandwidth in bytes a second."""

    sender: int
    receiver: int
    latency_s: float
    bytes_per_s: float


def all_reduce_s(ranks: Ranks, num_bytes: int) -> float:
    """Seconds of one fp32 all-reduce of `num_bytes` over all ranks: the median of a few, on rank 0. Collective."""
    values = torch.ones(num_bytes // 4, device=ranks.device)

    def once() -> None:
        dist.all_reduce(values)
        values.mul_(1 / ranks.world)

    once()  # the first call opens the connections
    return float(ranks.gather(statistics.median(_timed(once, ranks) for _ in range(NUM_ROUNDS)))[0])


def measure_links(ranks: Ranks, pairs: Sequence[tuple[int, int]], num_bytes: int) -> list[Link]:
    """Latency and bandwidth of each (sender, receiver), one at a time, so that no pair shares a wire. Collective."""
    links = []
    for sender, receiver in pairs:
        ranks.barrier()
        link = None
        if ranks.rank in (sender, receiver):
            _exchange(ranks, sender, receiver, SMALL_BYTES)  # the first exchange opens the connections
            pings = [_exchange(ranks, sender, receiver, SMALL_BYTES) for _ in range(NUM_PINGS)]
            transfers = [_exchange(ranks, sender, receiver, num_bytes) for _ in range(NUM_ROUNDS)]
            latency_s = statistics.median(pings) / 2
            transfer_s = max(statistics.median(transfers) - latency_s, 1e-9)
            link = Link(sender, receiver, latency_s, num_bytes / transfer_s)
        links.append(ranks.gather(link)[sender])
    return links


def _exchange(ranks: Ranks, sender: int, receiver: int, num_bytes: int) -> float:
    """Seconds from sending `num_bytes` to having the receiver's short answer, on the sender."""
    payload = torch.zeros(num_bytes, dtype=torch.uint8, device=ranks.device)
    answer = torch.zeros(SMALL_BYTES, dtype=torch.uint8, device=ranks.device)

    def once() -> None:
        if ranks.rank == sender:
            dist.send(payload, receiver)
            dist.recv(answer, receiver)
        else:
            dist.recv(payload, sender)
            dist.send(answer, sender)

    return _timed(once, ranks)


def _timed(once: Callable[[], None], ranks: Ranks) -> float:
    _synchronize(ranks)
    begin_s = time.perf_counter()
    once()
    _synchronize(ranks)
    return time.perf_counter() - begin_s


def _synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
