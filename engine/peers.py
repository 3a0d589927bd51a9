"""Finds ranks that have not come or have gone. Every message names the node to look at."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from base.terminal import say
from engine import job_endings
from engine.job_endings import LOST_CONTACT, End, EndedError, LostContactError
from engine.network_access import is_one_host, open_store

MEETING_S = 600
"""How long ranks wait for each other at the start: many nodes importing from one file system take minutes."""
REMINDER_S = 30
VANISHED_S = 60
"""Seconds after which a node that neither answers nor closes its connections (power, network) counts as gone."""
ROLL_CALL = "roll_call"
ABSENCE_S = 20
"""How long a rank that cannot take part looks for the first rank before it prints its error itself."""

BROKEN = re.compile(r"(?i)connection|broken pipe|timed out|unreachable|no route|remote process exited")

_host_of_address: dict[str, str] = {}
_has_met = False


@dataclass(frozen=True)
class Verdict:
    """What the first rank announces after the roll call: who is present, or why the job ends."""

    end: End | None
    present: tuple[str, ...] = ()
    """A random name of every rank, in rank order. A rank of another job at this port does not find its name."""
    num_readers: int = 0
    """Number of ranks that wait for each other if the job ends here."""


def meet(timeout_s: float) -> None:
    """Waits until every rank has reached the first rank; then each learns of another's end (engine/job_endings.py).

    Raises LostContactError: ranks did not come (the first rank names them), or the first rank cannot be reached (the
    message names the address). Raises EndedError: another rank could not take part, or ended the job.
    """
    global _has_met
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, me = _store(timeout_s), uuid.uuid4().hex
    store.set(f"{ROLL_CALL}/{rank}", me)
    verdict = _call_the_roll(store, world, timeout_s) if rank == 0 else None
    verdict = _announce(store, verdict, timeout_s + REMINDER_S)
    if verdict.end is not None:
        _part(store, rank, verdict)
        raise LostContactError(verdict.end.text) if verdict.end.rank == rank else EndedError(verdict.end)
    if verdict.present[rank] != me:
        raise LostContactError(f"{_where()} is the port of another job; give another --master_port")
    _has_met = True
    if world > 1:
        job_endings.open_board(store, f"end/{verdict.present[0]}", rank, world)


def end(own: End, world: int, tell: Callable[[], None]) -> int:
    """The status with which this process must end now; all `world` ranks get one status.

    `own`: how this process would end. `tell` prints that; it is called if no other rank was faster. A rank that ends
    before the ranks meet tells the others, too.
    """
    if job_endings.is_open():
        return job_endings.end(own, tell)
    has_told, store, verdict = False, None, Verdict(None)
    if world > 1 and not _has_met and own.status != LOST_CONTACT:
        with contextlib.suppress(LostContactError, RuntimeError):  # no other rank can be reached
            try:
                store = _store(ABSENCE_S)
            except LostContactError:
                tell()
                has_told = True
                if own.rank == 0 or is_one_host():  # the launcher of this host ends the others
                    return own.status
                store = _store(MEETING_S)
            store.compare_set(f"{ROLL_CALL}/absent", "", json.dumps(asdict(own)))
            mine = Verdict(own, num_readers=world) if own.rank == 0 else None
            verdict = _announce(store, mine, ABSENCE_S)
    is_first_to_say = own.rank == 0 or not _has_met  # after parting, all ranks found it
    if not has_told and (verdict.end == own or (verdict.end is None and is_first_to_say)):
        tell()
    if store is None or verdict.end is None:  # a job that met without this rank is another job
        return own.status
    _part(store, own.rank, verdict)
    return verdict.end.status


def _store(timeout_s: float) -> dist.TCPStore:
    """This rank's client of the first rank's store. Raises LostContactError."""
    rank = int(os.environ["RANK"])
    try:
        return open_store(
            int(os.environ["MASTER_PORT"]),
            serves=rank == 0,
            timeout_s=timeout_s,
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except (dist.DistError, OSError) as error:
        what = "cannot listen on" if rank == 0 else "cannot reach the first rank at"
        raise LostContactError(
            f"rank {rank} on {socket.gethostname()} {what} {_where()}: {_first_line(error)}; check "
            "--master_addr, --master_port, the firewall, and what the first node printed"
        ) from None


def _where() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _announce(store: dist.TCPStore, verdict: Verdict | None, timeout_s: float) -> Verdict:
    """The first rank's verdict, on every rank."""
    if verdict is not None:
        store.set(f"{ROLL_CALL}/verdict", json.dumps(asdict(verdict)))
        return verdict
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    read = json.loads(store.get(f"{ROLL_CALL}/verdict"))
    return Verdict(read["end"] and End(**read["end"]), tuple(read["present"]), read["num_readers"])


def _part(store: dist.TCPStore, rank: int, verdict: Verdict) -> None:
    """Waits until the others have read how the job ends."""
    store.add(f"{ROLL_CALL}/read", 1)
    # Ranks of other hosts may still be building their models; this host's launcher ends the ranks of this host.
    within_s = job_endings.LINGER_S if is_one_host() else MEETING_S
    job_endings.part(store, ROLL_CALL, rank, verdict.num_readers, within_s)


def _call_the_roll(store: dist.TCPStore, world: int, timeout_s: float) -> Verdict:
    """The first rank's wait for all others. Prints the missing ranks from time to time."""
    num_local = int(os.environ.get("LOCAL_SIZE", "1"))
    begin_s = reminded_s = time.monotonic()
    missing = list(range(world))
    while True:
        if store.check([f"{ROLL_CALL}/absent"]):
            return Verdict(End(**json.loads(store.get(f"{ROLL_CALL}/absent"))), num_readers=world)
        missing = [rank for rank in missing if not store.check([f"{ROLL_CALL}/{rank}"])]
        if not missing:
            return Verdict(None, tuple(store.get(f"{ROLL_CALL}/{rank}").decode() for rank in range(world)))
        # The launcher numbers ranks in the order of the hostfile; with equal slots a rank's number gives its line.
        nodes = sorted({rank // num_local for rank in missing})
        who = f"ranks {numbers_text(missing)} (lines {numbers_text([node + 1 for node in nodes])} of the hostfile)"
        now_s = time.monotonic()
        if now_s - begin_s > timeout_s:
            num_here = world - len(missing)
            text = (
                f"{who} did not come to {_where()} within {timeout_s:.0f} s, {num_here} of {world} are here; "
                "see what the launcher printed for those nodes (ssh, python, network), or take them out of the hostfile"
            )
            return Verdict(End(0, LOST_CONTACT, text), num_readers=num_here)
        if now_s - reminded_s > REMINDER_S:
            say(f"waiting for {who} at {_where()}")
            reminded_s = now_s
        time.sleep(0.1)


def introduce(gathered: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Learns the addresses of each host. `gathered`: what `introduction` returned on each rank, in rank order."""
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

    Without this limit only the process group's timeout notices a node that loses power or network. That timeout must be
    long: ranks may rightly wait for a rank that samples or saves. The connections are those of gloo and of the store.
    """
    for connection in _connections():
        with connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_S // 4)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, VANISHED_S // 12)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED_S * 1000)


def _connections() -> list[socket.socket]:
    """This process's TCP connections to other hosts, each under a new descriptor that the caller closes.

    Empty without /proc. A caller may only set options: `socket.dup` and `setblocking` would change the mode on which
    gloo's event loop relies.
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
    except OSError:  # a listening socket has no peer
        return False


def lost_contact(error: BaseException) -> LostContactError | None:
    """The one-line error for a broken connection in a collective; None: `error` has another cause."""
    is_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not is_collective or not BROKEN.search(str(error)):
        return None
    peer = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
    who = _host_of_address.get(peer[1], peer[1]) if peer else "another rank"
    detail = re.sub(r"^\[[^\]]*\]\s*", "", _first_line(error)).partition(". ")[0]
    if is_one_host():
        remedy = "it was killed (out of memory?) or failed: look for the first error above, and in `dmesg`. "
        return LostContactError(
            f"lost contact with another rank of this host: {detail}; {remedy}"
            "The same command goes on from the last checkpoint"
        )
    return LostContactError(
        f"lost contact with {who}: {detail}; look for the first error there. The same command goes on from the last "
        "checkpoint once that node is back or replaced in the hostfile"
    )


def numbers_text(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5] -> "0-2, 5"`; `numbers` must ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
