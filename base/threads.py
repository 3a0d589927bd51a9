"""The cores that this process may use, and its compute threads: its share of them."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def num_cores(cgroup: Path = CGROUP) -> int:
    """Number of cores this process may use: a container or a scheduler can grant fewer than the machine has."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, _quota(cgroup))))


def share_cores() -> None:
    """Sets this process's threads, so that the ranks of a host share its cores.

    OMP_NUM_THREADS in the environment takes precedence. torch's default would give each rank all cores.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        num_local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        import torch  # here, so that the number of cores is known without it

        torch.set_num_threads(max(1, num_cores() // num_local_ranks))


def _quota(cgroup: Path) -> float:
    """Number of cores, possibly fractional, that a container's limit grants (cgroup v2, v1); inf: there is no limit."""
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
