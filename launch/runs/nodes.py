"""Checks, at the start of every training, what must be equal on every node, and names the node that differs.

The comparison is a pure function of the ranks' reports. `launch/check_nodes.py` prints more about the nodes.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from base import files, sources, threads
from base.config import UserError, flatten
from engine import distributed
from engine.distributed import Ranks
from engine.peers import numbers_text
from evaluation.environment import versions
from launch.runs.entry import REPOSITORY

REMEDIES = {
    "version": "install the pinned versions (constraints.txt) there",
    "source": "bring every node to the same commit",
    "config": "start every node with the same config and overrides",
    "data": "bring the same data to every node",
    "weights": "bring the same files to every node",
    "hardware": "a run is as slow as its slowest GPU; take that node out or repair it",
}
TOKEN = ".nodes-check"  # noqa: S105  # a file's name
SHARED_WITHIN_S = 15.0
"""How long a file may take to appear on other nodes: network file systems cache attributes."""

Facts = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Report:
    """One rank's report of its node. `facts`: by kind (a key of REMEDIES), then by name."""

    rank: int
    host: str
    facts: Facts


def facts(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Versions, source files and config of this process, which determine what it computes."""
    found = versions()
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {"version": found, "source": source_hashes(REPOSITORY), "config": flatten(config)}


def source_hashes(repository: Path) -> dict[str, str]:
    """Short SHA-256 of every Python file of the packages, which unlike a commit shows uncommitted edits."""
    return {path.relative_to(repository).as_posix(): files.sha256(path)[:12] for path in sources(repository)}


def differences(reports: Sequence[Report]) -> list[str]:
    """A line for each node and kind that differs from the majority of ranks; between equal halves rank 0's counts."""
    lines = []
    for kind, remedy in REMEDIES.items():
        odd: dict[str, list[str]] = {}
        names = sorted({name for report in reports for name in report.facts.get(kind, {})})
        for name in names:
            values = [report.facts.get(kind, {}).get(name, "none") for report in reports]
            counts = Counter(values)
            usual = max(counts, key=lambda value: (counts[value], value == values[0]))
            example = reports[values.index(usual)].host
            for value in sorted(set(values) - {usual}):
                for who in _nodes(reports, [i for i, other in enumerate(values) if other == value]):
                    odd.setdefault(who, []).append(f"{kind} {name} {value} where {example} has {usual}")
        for who, found in odd.items():
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            lines.append(f"{who}: {found[0]}{more}; {remedy}")
    return lines


def _nodes(reports: Sequence[Report], positions: Sequence[int]) -> list[str]:
    """`node-b (ranks 8-15)` for each host among these reports."""
    ranks: dict[str, list[int]] = {}
    for position in positions:
        ranks.setdefault(reports[position].host, []).append(reports[position].rank)
    return [
        f"{host} ({'rank' if len(found) == 1 else 'ranks'} {numbers_text(found)})"
        for host, found in ranks.items()
    ]


def compare(ranks: Ranks, own: Facts) -> list[str]:
    """`differences` of all ranks. Ranks exchange whole reports only if their digests differ. Collective."""
    if len(set(ranks.gather(files.digest(own)))) == 1:
        return []
    return differences(ranks.gather(Report(ranks.rank, socket.gethostname(), own)))


def not_shared(ranks: Ranks, run_dir: Path, within_s: float = SHARED_WITHIN_S) -> list[str]:
    """A line for each node on which `run_dir` is not the first rank's folder. Collective.

    Raises UserError: the first rank cannot write to it.
    """
    name = f"{TOKEN}-{uuid.uuid4().hex}"  # unique, because two starts at once must not mix; the run lock refuses one
    if ranks.is_first:
        try:
            files.write_text(run_dir / name, "")
        except OSError as error:
            raise UserError(f"{run_dir}: cannot write there: {error}; choose another run_dir") from None
    path = run_dir / ranks.gather(name)[0]
    try:
        deadline_s = time.monotonic() + within_s
        while not (sees := path.is_file()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        seen = ranks.gather((socket.gethostname(), sees))
    finally:
        if ranks.is_first:
            path.unlink(missing_ok=True)
    reports = [Report(rank, host, {}) for rank, (host, _) in enumerate(seen)]
    blind = _nodes(reports, [rank for rank, (_, sees) in enumerate(seen) if not sees])
    return [
        f"{who}: run_dir {run_dir} is not the folder that {seen[0][0]} writes to; use storage that all mount"
        for who in blind
    ]


def check_start(ranks: Ranks, run_dir: Path, config: Mapping[str, Any], inputs: Facts | None = None) -> None:
    """Refuses a training whose nodes differ, with one line that names a node. Collective.

    `inputs`: fingerprints of what this rank reads (launch/runs/input_fingerprints.py). Raises UserError: versions,
    source, config, data or weights differ, or run_dir is not shared.
    """
    lines = compare(ranks, {**facts(config), **(inputs or {})}) + not_shared(ranks, run_dir)
    if lines:
        more = f"; {len(lines) - 1} more, see launch/check_nodes.py" if len(lines) > 1 else ""
        distributed.stop()  # all ranks raise it; only the first prints it (entry.run)
        raise UserError(lines[0] + more)


@dataclass(frozen=True)
class Condition:
    """State of one rank's node, which may differ between nodes. Sizes in bytes, times in seconds since 1970."""

    host: str
    memory_free: int
    disk_free: int
    gpu_free: int
    gpu_total: int
    clock_s: float


MAX_CLOCK_DIFFERENCE_S = 2.0
MIN_GPU_FREE = 0.9
GIB = 2**30


def hardware() -> dict[str, str]:
    """GPU model, number of GPUs on this node and driver; on a CPU, the number of cores."""
    if not torch.cuda.is_available():
        return {"GPU": "none", "CPU cores": str(threads.num_cores())}
    driver = Path("/proc/driver/nvidia/version")
    return {
        "GPU": torch.cuda.get_device_name(),
        "GPU count": str(torch.cuda.device_count()),
        "GPU driver": driver.read_text().splitlines()[0] if driver.is_file() else "unknown",
    }


def condition(run_dir: Path, device: torch.device) -> Condition:
    """This node's present state: free memory and disk, and its clock."""
    gpu_free, gpu_total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    memory_free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    disk_free = shutil.disk_usage(run_dir).free
    return Condition(socket.gethostname(), memory_free, disk_free, gpu_free, gpu_total, time.time())


def suspects(conditions: Sequence[Condition]) -> list[str]:
    """A line for each rank whose clock is off or whose GPU is in use. `conditions`: of one moment, in rank order."""
    lines = []
    clocks = sorted(state.clock_s for state in conditions)
    usual_s = clocks[len(clocks) // 2] if len(clocks) > 2 else conditions[0].clock_s
    for rank, state in enumerate(conditions):
        off_s = state.clock_s - usual_s
        if abs(off_s) > MAX_CLOCK_DIFFERENCE_S:
            lines.append(f"{state.host} (rank {rank}): clock is {off_s:+.1f} s off; run an NTP client there")
        if state.gpu_free < MIN_GPU_FREE * state.gpu_total:
            used = f"{(state.gpu_total - state.gpu_free) / GIB:.0f} of {state.gpu_total / GIB:.0f} GiB"
            lines.append(
                f"{state.host} (rank {rank}): {used} of its GPU are in use; end the other process (nvidia-smi)"
            )
    return lines
