"""Restricts who may connect to the ranks: if all of them are on this host, nobody outside it may.

torch's stores and gloo accept what any client sends, without a password. By default a store listens on every interface,
and gloo on the interface that the host's name resolves to.
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
    """Whether all ranks are on this host, according to the launcher's environment."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    return local is not None and local == os.environ.get("WORLD_SIZE")


def keep_to_host() -> None:
    """If all ranks are on this host, makes them meet on the loopback, and gloo and NCCL listen there.

    An interface named in the environment stays. NCCL uses the interface for its set-up only: within a host, tensors go
    through NVLink, PCIe or shared memory.
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
    """A client of the store at MASTER_ADDR. This process is the server if it `serves` (port 0: any free port).

    If MASTER_ADDR is the loopback, the server listens on the loopback only. The process group shares the store, which
    torch's env:// opens in the same way. Raises OSError or DistError: the port is taken, or nobody answers.
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
    """Whether torchrun serves the store itself."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
