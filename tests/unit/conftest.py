"""Shared: several ranks in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch


class ThreadRank:
    """What engine.distributed.Ranks gives to one rank; the ranks are threads that meet at a barrier."""

    device = torch.device("cpu")

    def __init__(self, rank: int, world: int, meeting: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.world = rank, world
        self._meeting, self._table = meeting, table

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._meeting.wait()
        found = list(self._table)
        self._meeting.wait()
        return found

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(values)).sum(0)


@pytest.fixture(scope="session")
def together() -> Callable[..., list[Any]]:
    """`together(world, action)`: what action(ranks) returns on each rank; raises the error of the first that fails."""

    def run(world: int, action: Callable[[ThreadRank], Any]) -> list[Any]:
        meeting, table = threading.Barrier(world, timeout=60), [None] * world
        results: list[Any] = [None] * world
        errors: list[BaseException] = []

        def rank(number: int) -> None:
            try:
                results[number] = action(ThreadRank(number, world, meeting, table))
            except BaseException as error:
                errors.append(error)
                meeting.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    return run
