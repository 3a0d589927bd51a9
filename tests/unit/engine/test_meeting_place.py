"""Where ranks meet: on the loopback if no other host takes part."""

from __future__ import annotations

import os
import socket

import pytest

from engine import network_access


def meeting_place(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, str | None, str | None]:
    """The address, and gloo's and NCCL's interfaces, that these variables lead to."""
    for name in (
        *network_access._INTERFACES,
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "TORCHELASTIC_USE_AGENT_STORE",
    ):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back afterwards
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    network_access.keep_to_host()
    gloo, nccl = (os.environ.get(name) for name in network_access._INTERFACES)
    return os.environ["MASTER_ADDR"], gloo, nccl


@pytest.mark.parametrize(
    "environment",
    [
        {
            "WORLD_SIZE": "8",
            "LOCAL_SIZE": "8",
            "MASTER_ADDR": "node-a",
        },  # the deepspeed launcher, with a hostfile
        {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1"},
        {"WORLD_SIZE": "8", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "node-a"},
    ],
)
def test_ranks_of_one_host_meet_on_its_loopback(monkeypatch, environment) -> None:
    assert meeting_place(monkeypatch, **environment) == ("127.0.0.1", "lo", "lo")


def test_an_interface_that_was_named_stays(monkeypatch) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "node-a"}
    assert meeting_place(monkeypatch, **environment, NCCL_SOCKET_IFNAME="ib0") == ("127.0.0.1", "lo", "ib0")


def test_several_hosts_meet_where_the_launcher_says(monkeypatch) -> None:
    environment = {"WORLD_SIZE": "8", "LOCAL_SIZE": "4", "MASTER_ADDR": "node-a"}
    assert meeting_place(monkeypatch, **environment) == ("node-a", None, None)


def test_a_store_that_torchrun_serves_stays_where_it_is(monkeypatch) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert meeting_place(monkeypatch, **environment, MASTER_ADDR="node-a") == ("node-a", "lo", "lo")


def test_a_store_on_the_loopback_cannot_be_reached_at_another_address(monkeypatch) -> None:
    meeting_place(monkeypatch, WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    store = network_access.open_store(0, serves=True, timeout_s=5.0)
    client = network_access.open_store(store.port, serves=False, timeout_s=5.0)
    client.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5.0)
