"""Measures which parts of a step take its time, and knows the device's peak FLOP/s."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Dense bf16 FLOP/s from the vendors' data sheets, by a part of the device's name; the first match counts.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None: a CPU, or a GPU that the table does not list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Place:
    """The position of a rank within a step."""

    part: str
    """The innermost open part; empty: the rank is between two parts."""
    num_entered: int
    """Number of parts entered since `begin_step`."""


class Spans:
    """Seconds spent in named parts of the loop since the last `read`. Time in a nested part counts for that part only.

    On a GPU, events time the parts that run on the stream; nothing waits for the events before `read`. The parts in
    HOST (data, waiting for ranks, checkpoint, samples, evaluation) are measured in wall time.
    """

    HOST = ("data", "waiting", "checkpoint", "samples", "evaluation")

    def __init__(self, device: torch.device) -> None:
        self._on_stream = device.type == "cuda"
        self._measured: dict[str, list[Callable[[], float]]] = defaultdict(list)
        # One list for each open part: the measurements of the parts nested in it.
        self._inside: list[list[Callable[[], float]]] = []
        self._open: list[str] = []
        self._num_entered = 0
        self.failed_in = ""  # the innermost part in which an exception was raised
        self._begin_s = time.monotonic()

    def begin_step(self) -> None:
        """Restarts the count `num_entered` of `place`."""
        self._num_entered = 0

    @property
    def place(self) -> Place:
        """The rank's present position. Another thread may read it."""
        return Place(next(reversed(self._open), ""), self._num_entered)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block's time for `name`, except the time of blocks nested in it."""
        inside: list[Callable[[], float]] = []
        self._inside.append(inside)
        self._open.append(name)
        self._num_entered += 1
        measure = self._start(on_stream=self._on_stream and name not in self.HOST)
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or name
            raise
        finally:
            whole = measure()
            self._inside.pop()
            self._open.pop()
            self._measured[name].append(lambda: whole() - sum(part() for part in inside))
            if self._inside:
                self._inside[-1].append(whole)

    def _start(self, *, on_stream: bool) -> Callable[[], Callable[[], float]]:
        """Starts a measurement. Calling the result ends it and returns a function that reads the seconds."""
        if not on_stream:
            begin_s = time.monotonic()

            def stop() -> Callable[[], float]:
                spent_s = time.monotonic() - begin_s
                return lambda: spent_s

            return stop
        begin = _event()
        begin.record()

        def record() -> Callable[[], float]:
            end = _event()
            end.record()
            return lambda: float(begin.elapsed_time(end)) / 1000

        return record

    def read(self) -> dict[str, float]:
        """{NAME_share: share of the wall time since the last call}. Waits for the device."""
        if self._on_stream:
            torch.cuda.synchronize()
        now_s = time.monotonic()
        wall_s = max(now_s - self._begin_s, 1e-9)
        shares = {
            f"{name}_share": sum(measure() for measure in measures) / wall_s
            for name, measures in self._measured.items()
        }
        self._measured.clear()
        self._begin_s = now_s
        return shares


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
