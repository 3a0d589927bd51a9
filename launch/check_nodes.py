"""Checks that all nodes fit together: deepspeed --hostfile HOSTS launch/check_nodes.py --config FILE

Compares versions, source, config, GPUs, drivers, clocks and the run folder, and names the node that differs. Measures
an all-reduce and the connection from every node to the next. Exit status 2: a difference was found.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from base.config import UserError, counted, names_of, resolve
from base.terminal import say
from launch.runs import entry

if TYPE_CHECKING:
    from engine.link_speed import Link

MEETING_S = 120
MESSAGE_BYTES = 64 << 20
GIB = 2**30
SLOW = 0.5
"""Share of the median bandwidth below which a connection is reported."""


def main() -> None:
    """Prints what every node has, and every difference."""
    parser = entry.parser(__doc__ or "")
    parser.add_argument(
        "--config", action="append", required=True, help="YAML of the run that the nodes are for"
    )
    parser.add_argument(
        "--expect", type=int, metavar="N", help="nodes that must meet: with a mistyped hostfile fewer do"
    )
    parser.add_argument("--run-dir", type=Path, help="its folder (default: the config's run_dir)")
    arguments = parser.parse_args()
    config = resolve(arguments.config)
    run_dir = arguments.run_dir or Path(str(config.get("run_dir", "")))
    if not str(run_dir).strip("."):
        raise UserError(f"{names_of(arguments.config)}: names no run_dir; give --run-dir")
    entry.use_torch()
    from engine import distributed
    from engine.link_speed import all_reduce_s, measure_links
    from launch.runs import nodes

    ranks = distributed.start(meeting_s=MEETING_S)
    findings = nodes.compare(ranks, {**nodes.facts(config), "hardware": nodes.hardware()})
    findings += nodes.not_shared(ranks, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)  # every rank: the folder may not be shared
    ranks.barrier()
    conditions = ranks.gather(nodes.condition(run_dir, ranks.device))
    findings += nodes.suspects(conditions)
    first_ranks = {state.host: rank for rank, state in reversed(list(enumerate(conditions)))}
    ring = sorted(first_ranks.values())
    pairs = [(a, b) for a, b in zip(ring, ring[1:] + ring[:1], strict=True) if a != b]
    reduce_s = all_reduce_s(ranks, MESSAGE_BYTES)
    links = measure_links(ranks, pairs, MESSAGE_BYTES)
    hosts = [state.host for state in conditions]
    findings += number_of_nodes(sorted(first_ranks), arguments.expect)
    findings += slow_links(links, hosts)
    if ranks.is_first:
        for host, rank in sorted(first_ranks.items(), key=lambda item: item[1]):
            state = conditions[rank]
            say(
                f"{host}: {hosts.count(host)} ranks, memory free {state.memory_free / GIB:.1f} GiB, "
                f"disk free at run_dir {state.disk_free / GIB:.1f} GiB"
            )
        say(f"all-reduce of {MESSAGE_BYTES >> 20} MiB over {ranks.world} ranks: {reduce_s * 1e3:.1f} ms")
        for link in links:
            speed = f"{link.bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e6:.0f} us"
            say(f"{hosts[link.sender]} -> {hosts[link.receiver]}: {speed}")
        for line in findings:
            say(f"FOUND {line}")
    distributed.stop()
    if findings:  # equal on all ranks; the first rank prints them (entry.run)
        raise UserError(
            f"{counted(len(findings), 'finding')} on {counted(len(first_ranks), 'node')}, listed above"
        )
    if ranks.is_first:
        say(f"{counted(len(first_ranks), 'node')}: nothing differs")


def number_of_nodes(met: Sequence[str], expected: int | None) -> list[str]:
    """A line if more or fewer than `expected` nodes met: with a mistyped hostfile the job runs on one node."""
    if expected in (None, len(met)):
        return []
    found = f"{counted(len(met), 'node')} met where --expect says {expected}"
    return [f"{found}: {', '.join(met)}; check the hostfile's name and lines"]


def slow_links(links: Sequence[Link], hosts: Sequence[str]) -> list[str]:
    """A line for each connection far below the median bandwidth; [] for two nodes, which have no useful median."""
    if len(links) < 3:
        return []
    usual = statistics.median(link.bytes_per_s for link in links)
    return [
        f"{hosts[link.sender]} -> {hosts[link.receiver]}: {link.bytes_per_s / 1e9:.2f} GB/s where the median is "
        f"{usual / 1e9:.2f}; check that cable, port and NCCL_SOCKET_IFNAME / NCCL_IB_HCA there"
        for link in links
        if link.bytes_per_s < SLOW * usual
    ]


if __name__ == "__main__":
    sys.exit(entry.run(main))
