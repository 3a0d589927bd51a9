"""Who may connect to the ranks: nobody outside this host, where all of them are on it.

torch's stores and gloo take what any client sends, without a password. By default a store listens on every interface,
and gloo on the one that the host's name leads to.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = (LOOPBACK, "localhost", "::1")
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def is_one_host() -> bool:
    """Whether one launcher has started all ranks, as far as it says so."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return local is not None and local == os.environ.get("WORLD_SIZE")


def keep_to_host() -> None:
    """Where all ranks are on this host they meet on its loopback, and gloo and NCCL listen there.

    An interface that somebody has named stays. Which one NCCL takes for its set-up says nothing about the tensors:
    within a host they go through NVLink, PCIe or shared memory.
    """
    is_alone = os.environ["WORLD_SIZE"] == "1"
    if not (is_alone or is_one_host() or os.environ["MASTER_ADDR"] in _LOOPBACK_NAMES):
        return
    if not _is_served_by_launcher():
        os.environ["MASTER_ADDR"] = LOOPBACK
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if name is not None:
        for variable in _INTERFACES:
            os.environ.setdefault(variable, name)


def open_store(port: int, *, serves: bool, timeout_s: float, world_size: int | None = None) -> dist.TCPStore:
    """A client of the store at MASTER_ADDR. Its server is this process, if it `serves` (port 0: any that is free).

    On the loopback the server listens there only. The process group that follows shares it (torch's env:// asks for it
    alike). Raises OSError or DistError: the port is taken, nobody answers.
    """
    keep_to_host()
    descriptor = None
    if serves and os.environ["MASTER_ADDR"] == LOOPBACK and not _is_served_by_launcher():
        listener = socket.create_server((LOOPBACK, port))
        port, descriptor = listener.getsockname()[1], listener.detach()
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        world_size,
        is_master=serves,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )


def _is_served_by_launcher() -> bool:
    """torchrun holds the store itself, at an address of its own."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
