"""The other ranks, by host: who has not come, who has gone. Every message names the node to look at."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.config import UserError

MEETING_S = 600
"""How long ranks wait for each other at the start: many nodes that import from one file system take minutes."""
REMINDER_S = 30
VANISHED_S = 60
"""A node that neither answers nor closes its connections (power, network) is given up after this long."""
ROLL_CALL = "roll_call"
EXIT_STATUS = 76
"""Of a process that ends because another one is gone or hangs: a scheduler may give the same command again."""

BROKEN = re.compile(r"(?i)connection|broken pipe|timed out|unreachable|no route|remote process exited")

_host_of_address: dict[str, str] = {}


class LostContactError(UserError):
    """Another rank is gone: this one cannot go on."""


def meet(timeout_s: float) -> Any:
    """Waits until every rank has reached the first one; what it returns must live until the process group stands.

    Raises LostContactError naming the ranks that did not come (on the first rank), or the address that was not
    reached (on the others; UserError, when it is not theirs to say).
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # multi_tenant: the process group that follows shares this server (torch's env:// asks for it alike).
        store = dist.TCPStore(
            address,
            port,
            world,
            is_master=rank == 0,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        what = "cannot listen on" if rank == 0 else "cannot reach the first rank at"
        raise LostContactError(
            f"rank {rank} on {socket.gethostname()} {what} {address}:{port}: {_first_line(error)}; check "
            "--master_addr, --master_port, the firewall, and what the first node printed"
        ) from None
    store.set(f"{ROLL_CALL}/{rank}", socket.gethostname())
    if rank == 0:
        verdict = _call_the_roll(store, world, f"{address}:{port}", timeout_s)
        store.set(f"{ROLL_CALL}/verdict", verdict)
    else:
        store.set_timeout(datetime.timedelta(seconds=timeout_s + REMINDER_S))
        verdict = store.get(f"{ROLL_CALL}/verdict").decode()
    if verdict:
        raise LostContactError(verdict) if rank == 0 else UserError(verdict)  # one rank says it for all
    return store


def _call_the_roll(store: dist.TCPStore, world: int, where: str, timeout_s: float) -> str:
    """Empty once all have come, or who has not. Prints who is being waited for now and then."""
    num_local = int(os.environ.get("LOCAL_SIZE", "1"))
    begin_s = reminded_s = time.monotonic()
    missing = list(range(world))
    while True:
        missing = [rank for rank in missing if not store.check([f"{ROLL_CALL}/{rank}"])]
        if not missing:
            return ""
        # Ranks are dealt to nodes in the order of the hostfile; with equal slots a rank tells its line.
        nodes = sorted({rank // num_local for rank in missing})
        who = f"ranks {numbers_text(missing)} (lines {numbers_text([node + 1 for node in nodes])} of the hostfile)"
        now_s = time.monotonic()
        if now_s - begin_s > timeout_s:
            return (
                f"{who} did not come to {where} within {timeout_s:.0f} s, {world - len(missing)} of {world} are here; "
                "see what the launcher printed for those nodes (ssh, python, network), or take them out of the hostfile"
            )
        if now_s - reminded_s > REMINDER_S:
            print(f"waiting for {who} at {where}", flush=True)
            reminded_s = now_s
        time.sleep(0.1)


def introduce(gathered: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Learns which host has which addresses, from what `introduction` gave on each rank, in rank order."""
    ranks: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(gathered):
        ranks.setdefault(host, []).append(rank)
    for host, addresses in gathered:
        noun = "rank" if len(ranks[host]) == 1 else "ranks"
        for address in addresses:
            _host_of_address[address] = f"{host} ({noun} {numbers_text(ranks[host])})"


def introduction() -> tuple[str, list[str]]:
    """This host's name, and its addresses on the connections to other hosts."""
    addresses = set()
    for connection in _connections():
        with connection:
            addresses.add(connection.getsockname()[0])
    return socket.gethostname(), sorted(addresses)


def notice_vanished_peers() -> None:
    """Sets the time after which a silent connection to another host counts as broken.

    Without it a node that loses power or network is noticed by the timeout of the process group only, which must be
    long: ranks may rightly wait for one that samples or saves. These are the connections of gloo and of the store.
    """
    for connection in _connections():
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_S // 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, VANISHED_S // 12)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_S * 1000)


def _connections() -> list[socket.socket]:
    """This process's TCP connections to other hosts, each under a new descriptor to close; empty without /proc.

    Only options are set on them: `dup` and `setblocking` would change the mode that gloo's event loop relies on.
    """
    descriptors = Path("/proc/self/fd")
    numbers = [int(entry.name) for entry in descriptors.iterdir()] if descriptors.is_dir() else []
    found = []
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                candidate = socket.socket(fileno=os.dup(number))
                if _leads_elsewhere(candidate):
                    found.append(candidate)
                else:
                    candidate.close()
    return found


def _leads_elsewhere(connection: socket.socket) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return False
    try:
        return bool(connection.getpeername()[0] != connection.getsockname()[0])
    except OSError:  # it listens
        return False


def lost_contact(error: RuntimeError) -> LostContactError | None:
    """What a broken connection in a collective means for a person; None: the error is another one."""
    is_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not is_collective or not BROKEN.search(str(error)):
        return None
    peer = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
    who = _host_of_address.get(peer[1], peer[1]) if peer else "another rank"
    detail = re.sub(r"^\[[^\]]*\]\s*", "", _first_line(error)).partition(". ")[0]
    return LostContactError(
        f"lost contact with {who}: {detail}; look for the first error there. The same command goes on from the last "
        "checkpoint once that node is back or replaced in the hostfile"
    )


def numbers_text(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5] -> "0-2, 5"`; the numbers ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
