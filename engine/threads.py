"""How many threads a process computes with: its share of the cores that are there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def num_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use: a container or a scheduler can give it fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, _quota(cgroup))))


def share_cores() -> None:
    """Sets the threads of this process, which shares the cores with the other ranks of its host.

    OMP_NUM_THREADS of the environment stands. torch's default would give each rank all cores of the machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        num_local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, num_cores() // num_local_ranks))


def _quota(cgroup: Path) -> float:
    """Cores' worth of time that a container's limit grants (cgroup v2, v1); inf: there is none."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        cores = float(quota) / float(period)
    except (OSError, ValueError):  # no cgroups; "max"
        return float("inf")
    return cores if cores > 0 else float("inf")
