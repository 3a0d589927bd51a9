"""Shards over HTTP, against servers that are slow, that fail now and then or for good, and that know no ranges."""

from __future__ import annotations

import collections
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.config import UserError
from data.config import StorageConfig
from data.shards import Sample, ShardDataset, ShardWriter, block_cache, remote_folder, remote_shards

BLOCK = 4096
NUM_SAMPLES = 24
SECRET = "X-Signature=topsecret"


def make_sample(number: int) -> Sample:
    payload = np.random.default_rng(number).bytes(2000 + 61 * number)
    return Sample(
        f"item{number:04d}", {"png": payload, "json": json.dumps({"caption": f"n {number}"}).encode()}
    )


class Server(ThreadingHTTPServer):
    """Serves a folder with range requests. `answer` may do something else: it returns True when it has answered."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []  # file name, "first-last" or ""
        self.lock = threading.Lock()
        self.answer: Callable[[Handler, str, str], bool] = lambda handler, name, span: False
        self.knows_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.reply(with_body=False)

    def do_GET(self) -> None:
        self.reply(with_body=True)

    def reply(self, *, with_body: bool) -> None:
        name = self.path.partition("?")[0].removeprefix("/")
        span = self.headers.get("Range", "").removeprefix("bytes=")
        with self.server.lock:
            self.server.requests.append((name, span))
        if self.server.answer(self, name, span):
            return
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        self.send(path.read_bytes(), span if self.server.knows_ranges else "", with_body)

    def send(self, content: bytes, span: str, with_body: bool = True, cut: int = 0) -> None:
        """`cut`: bytes that are promised but not sent."""
        total = len(content)
        if span:
            first, last = re.fullmatch(r"(\d+)-(\d+)", span).groups()  # type: ignore[union-attr]
            content = content[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) - cut])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    with ShardWriter(directory, max_samples_per_shard=10, source="test") as writer:
        for number in range(NUM_SAMPLES):
            writer.write(make_sample(number), num_text_tokens=number)
    return directory


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Small blocks, and no waiting between attempts."""
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote_shards, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_S", 0.0)
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def config(tmp_path: Path, **change: Any) -> StorageConfig:
    return StorageConfig(
        **{"cache_dir": str(tmp_path / "cache"), "attempts": 3, "parallel_reads": 4, **change}
    )


def expect_all(dataset: ShardDataset) -> None:
    assert dataset.read(range(NUM_SAMPLES)) == [make_sample(number) for number in range(NUM_SAMPLES)]


def tar_requests(server: Server) -> list[tuple[str, str]]:
    with server.lock:
        return [(name, span) for name, span in server.requests if name.endswith(".tar") and span]


def test_shards_are_read_by_ranges_and_only_once(server: Server, tmp_path: Path) -> None:
    dataset = ShardDataset.open(server.url, config(tmp_path))
    expect_all(dataset)
    asked = tar_requests(server)
    assert len(asked) == len(set(asked)) > 3
    assert dataset.num_text_tokens.tolist() == list(range(NUM_SAMPLES))
    server.requests.clear()
    expect_all(dataset)
    expect_all(ShardDataset.open(server.url, config(tmp_path)))
    assert tar_requests(server) == []


def test_a_signed_url_signs_every_file_and_is_never_shown(server: Server, tmp_path: Path) -> None:
    unsigned: list[str] = []

    def check(handler: Handler, name: str, span: str) -> bool:
        if not handler.path.endswith(f"?{SECRET}"):
            unsigned.append(handler.path)
        if name != "shard-000001.tar" or not span:
            return False
        handler.send_error(403, "expired")
        return True

    server.answer = check
    url = server.url.replace("://", "://me:password@")
    dataset = ShardDataset.open(f"{url}/?{SECRET}", config(tmp_path))
    with pytest.raises(UserError) as error:
        expect_all(dataset)
    assert unsigned == []
    for text in (str(error.value), str(dataset.directory), dataset.read([0])[0].where):
        assert server.url in text
        assert "topsecret" not in text
        assert "password" not in text
    assert "403" in str(error.value)
    assert "after 1 attempt;" in str(error.value)


def test_slow_storage_has_several_requests_in_flight(server: Server, tmp_path: Path) -> None:
    """Nothing is answered before four blocks were asked for: one request after the other would never end."""
    dataset = ShardDataset.open(server.url, config(tmp_path))
    together = threading.Barrier(4, timeout=20)
    met = 0

    def wait(handler: Handler, name: str, span: str) -> bool:
        nonlocal met
        with server.lock:
            met += 1
            is_first = met <= 4
        if is_first:
            together.wait()
        return False

    server.answer = wait
    expect_all(dataset)
    assert met > 4


def test_announced_blocks_are_there_before_they_are_read(server: Server, tmp_path: Path) -> None:
    dataset = ShardDataset.open(server.url, config(tmp_path))
    dataset.will_need(range(NUM_SAMPLES))
    queue = dataset._payloads._queue  # type: ignore[attr-defined]
    while queue._futures:
        for future in list(queue._futures.values()):
            future.result(timeout=20)
    asked = tar_requests(server)
    assert len(asked) == len(set(asked)) > 3
    expect_all(dataset)
    assert tar_requests(server) == asked


@pytest.mark.parametrize("trouble", ["503", "429", "cut"])
def test_transient_trouble_of_every_file_is_survived(server: Server, tmp_path: Path, trouble: str) -> None:
    """Every request fails twice: of sizes, manifest, indices and blocks."""
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()

    def fail(handler: Handler, name: str, span: str) -> bool:
        with server.lock:
            seen[handler.command, name, span] += 1
            is_early = seen[handler.command, name, span] <= 2
        if not is_early or (handler.command == "HEAD" and trouble == "cut"):
            return False
        if trouble != "cut":
            handler.send_error(int(trouble))
        else:
            handler.send((server.folder / name).read_bytes(), span, cut=1)
            handler.close_connection = True
        return True

    server.answer = fail
    dataset = ShardDataset.open(server.url, config(tmp_path, attempts=4))
    expect_all(dataset)


@pytest.mark.parametrize("name", ["manifest.json", "shard-000001.index.npy", "shard-000001.tar"])
def test_storage_that_fails_for_good_ends_with_one_line(server: Server, tmp_path: Path, name: str) -> None:
    def fail(handler: Handler, asked: str, span: str) -> bool:
        if asked == name:
            handler.send_error(500)
        return asked == name

    server.answer = fail
    with pytest.raises(UserError) as error:
        ShardDataset.open(server.url, config(tmp_path))
    assert str(error.value).startswith(f"{server.url}/{name}: cannot be read (500")
    assert "after 3 attempts; check the storage" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_never_answers_ends_with_one_line(server: Server, tmp_path: Path) -> None:
    dataset = ShardDataset.open(server.url, config(tmp_path, timeout_s=0.2, attempts=2))
    leave = threading.Event()

    def hang(handler: Handler, name: str, span: str) -> bool:
        leave.wait(timeout=20)
        return True

    server.answer = hang
    with pytest.raises(UserError, match=r"shard-000000.tar: cannot be read .*Timeout.* after 2 attempts"):
        dataset.read([0])
    leave.set()


def test_missing_shard_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    def miss(handler: Handler, name: str, span: str) -> bool:
        if name == "shard-000002.tar":
            handler.send_error(404)
        return name == "shard-000002.tar"

    server.answer = miss
    with pytest.raises(UserError, match=r"/shard-000002.tar: shard is missing"):
        ShardDataset.open(server.url, config(tmp_path))
    assert len([name for name, _ in server.requests if name == "shard-000002.tar"]) == 2  # HEAD, then GET


def test_a_server_without_ranges_is_refused_before_a_shard_is_read(server: Server, tmp_path: Path) -> None:
    server.knows_ranges = False
    with pytest.raises(UserError, match=r"manifest.json: the server sends whole files instead of the range"):
        ShardDataset.open(server.url, config(tmp_path))
    assert {name for name, _ in server.requests} == {"manifest.json"}


def test_a_server_without_sizes_is_refused(server: Server, tmp_path: Path) -> None:
    def unsized(handler: Handler, name: str, span: str) -> bool:
        if name.endswith(".tar"):
            handler.send_response(200)
            handler.end_headers()
            handler.close_connection = True
        return name.endswith(".tar")

    server.answer = unsized
    with pytest.raises(UserError, match=r"shard-00000\d.tar: the server does not tell its size"):
        ShardDataset.open(server.url, config(tmp_path))
