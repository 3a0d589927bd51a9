"""Who has not come and who is gone, by host."""

from __future__ import annotations

import socket

import pytest

from engine import peers
from engine.distributed import free_port


@pytest.fixture
def rank_of_three(monkeypatch: pytest.MonkeyPatch):
    def set_rank(rank: int, port: int) -> None:
        values = {
            "RANK": rank,
            "WORLD_SIZE": 3,
            "LOCAL_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",  # what the meeting sets where all is on the loopback: taken back afterwards
            "NCCL_SOCKET_IFNAME": "lo",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_rank


def test_ranks_that_do_not_come_are_named_with_their_lines_of_the_hostfile(rank_of_three) -> None:
    rank_of_three(0, free_port())
    with pytest.raises(
        peers.LostContactError, match=r"ranks 1-2 \(lines 2-3 of the hostfile\) did not come to 127"
    ):
        peers.meet(0.5)


def test_a_port_that_is_taken_is_said(rank_of_three) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank_of_three(0, server.getsockname()[1])
        with pytest.raises(peers.LostContactError, match=r"rank 0 on .* cannot listen on 127\.0\.0\.1"):
            peers.meet(0.5)


def test_a_first_node_that_does_not_answer_is_named_by_its_address(rank_of_three) -> None:
    port = free_port()
    rank_of_three(1, port)
    with pytest.raises(peers.LostContactError, match=f"cannot reach the first rank at 127.0.0.1:{port}"):
        peers.meet(1.0)


def test_ranks_are_written_as_ranges() -> None:
    assert peers.numbers_text([0, 1, 2, 5, 8, 9]) == "0-2, 5, 8-9"


def test_a_broken_connection_names_the_host_behind_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_host_of_address", {})
    peers.introduce([("node-a", ["10.0.0.1"]), ("node-b", ["10.0.0.2"]), ("node-b", ["10.0.0.2"])])
    error = RuntimeError(
        "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:39118: Connection reset by peer. "
        "This is typically caused by a remote worker hanging."
    )
    lost = peers.lost_contact(error)
    assert lost is not None
    start = "lost contact with node-b (ranks 1-2): Read error [10.0.0.2]:39118: Connection reset by peer; "
    assert str(lost).startswith(start)


def test_other_errors_are_not_taken_for_a_lost_node() -> None:
    assert peers.lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied; connection")) is None
    assert peers.lost_contact(RuntimeError("[gloo/x.cc:1] op.preamble.length <= op.nbytes. 8 vs 4")) is None


def test_looking_at_connections_leaves_their_mode_alone() -> None:
    """gloo's event loop needs non-blocking sockets; a copied descriptor shares the mode."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.2", 0))  # another address: taken for another host
        client.connect(server.getsockname())
        client.setblocking(False)
        assert "127.0.0.2" in peers.introduction()[1]
        peers.notice_vanished_peers()
        with pytest.raises(BlockingIOError):
            client.recv(1)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
