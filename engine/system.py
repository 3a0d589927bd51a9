"""Readings of the machines under a run, taken for every log line. What a machine cannot tell is absent."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

GIB = 2**30
HIGHEST = ("system/resident_gib", "system/gpu_memory_gib", "system/gpu_temperature_c")
"""Readings that are logged as the highest of all ranks, which is what ends a run. All others are averaged."""


class SystemMeter:
    """Readings of one rank's process and device, and of the run folder's disk."""

    def __init__(self, device: torch.device, run_dir: Path | None) -> None:
        """`run_dir`: None on all ranks but the first; other ranks may see a shared folder late."""
        self._device, self._run_dir = device, run_dir
        self._process = psutil.Process()
        self._begin = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        """Readings by name; keys that this machine does not offer are absent.

        `system/cpu_cores`: cores this process kept busy since the last call; `system/resident_gib`: its memory;
        `system/disk_free_gib`: free space under the run folder; for the GPU `system/gpu_memory_gib` (all processes),
        `system/gpu_utilization` (0 to 1), `system/gpu_power_w` and `system/gpu_temperature_c`.
        """
        wall_s, cpu_s = time.monotonic(), time.process_time()
        cores = (cpu_s - self._begin[1]) / max(wall_s - self._begin[0], 1e-9)
        self._begin = wall_s, cpu_s
        values = {
            "system/cpu_cores": cores,
            "system/resident_gib": self._process.memory_info().rss / GIB,
        }
        if self._run_dir is not None:
            with contextlib.suppress(OSError):  # somebody has removed the folder
                values["system/disk_free_gib"] = shutil.disk_usage(self._run_dir).free / GIB
        return values | (_gpu(self._device) if self._device.type == "cuda" else {})


def combine(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines all ranks' readings into one value for each name: the maximum of HIGHEST, the mean of others."""
    values = {}
    for name in sorted(set().union(*readings)):
        found = [reading[name] for reading in readings if name in reading]
        if name in HIGHEST:
            values[name] = max(found)
        else:
            values[name] = sum(found) / len(found)
    return values


def _gpu(device: torch.device) -> dict[str, float]:
    """The driver's memory reading, and what NVML offers for this card (a MIG slice has no utilisation)."""
    free, total = torch.cuda.mem_get_info(device)
    values = {"system/gpu_memory_gib": (total - free) / GIB}
    if torch.version.hip is not None:
        return values
    import pynvml

    readers: dict[str, Callable[[], float]] = {
        "system/gpu_utilization": lambda: torch.cuda.utilization(device) / 100,
        "system/gpu_power_w": lambda: torch.cuda.power_draw(device) / 1000,
        "system/gpu_temperature_c": lambda: float(torch.cuda.temperature(device)),
    }
    for name, read in readers.items():
        try:
            values[name] = read()
        except (pynvml.NVMLError, RuntimeError):  # RuntimeError: torch does not find a MIG slice's card
            continue
    return values
