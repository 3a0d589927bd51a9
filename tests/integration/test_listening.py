"""Nobody outside the host can reach a job that runs on one host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

LOOPBACKS = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as /proc writes them."""
LISTENS = "0A"
UP_S = 60.0


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses, ADDRESS:PORT in hexadecimal digits, that TCP sockets of these processes listen on."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in table(name)]
    return {row[1] for row in rows if row[3] == LISTENS and row[9] in inodes}


def table(name: str) -> list[str]:
    path = Path("/proc/net") / name
    return path.read_text().splitlines()[1:] if path.is_file() else []


def test_a_job_on_one_host_listens_on_its_loopback_only(start_ranks, tmp_path) -> None:
    """All that listens in a training is there: the ranks' store, the watchdog's, and gloo."""
    run, output = tmp_path / "run", tmp_path / "output"
    options = ["--fault", "hang", "--fault-step", 2, "--hang-timeout", 600]
    processes = start_ranks("toy_train.py", ["--run", run, *options], 2, output)
    try:
        deadline_s = time.monotonic() + UP_S
        while not is_training(run) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        found = [listening([process.pid]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert len(found[0]) >= 3 and len(found[1]) >= 1, (found, output.read_text())
    outside = {place for places in found for place in places if place.rpartition(":")[0] not in LOOPBACKS}
    assert not outside


def is_training(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and bool(path.read_text())
