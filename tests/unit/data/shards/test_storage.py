"""Shards on other storage: the same samples from any url, a bounded cache, any damage named, nothing leaked."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from base import files
from base.config import ConfigError, UserError
from base.redaction import redact
from data.config import StorageConfig
from data.plan.plan import epoch_order
from data.shards import (
    Sample,
    ShardDataset,
    ShardWriter,
    block_cache,
    remote_folder,
    remote_shards,
    storage,
    write_manifest,
)
from data.shards.block_cache import BlockCache
from data.shards.storage import retrying

URL = "memory://bucket/set"
BLOCK = 4096
NUM_SAMPLES = 40


def make_sample(number: int) -> Sample:
    payload = np.random.default_rng(number).bytes(700 + 61 * number)
    return Sample(
        f"item{number:04d}", {"png": payload, "json": json.dumps({"caption": f"n {number}"}).encode()}
    )


def write(directory: Path) -> Path:
    with ShardWriter(directory, max_samples_per_shard=15, source="test") as writer:
        for number in range(NUM_SAMPLES):
            writer.write(make_sample(number), num_image_tokens=16, num_text_tokens=number)
    return directory


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("local") / "set")


class Requests:
    """What was asked of the memory file system; `fail` may raise instead of it, or change the answer."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.names: list[str] = []  # of whole files
        self.fail: Any = lambda path, start, content: content


@pytest.fixture
def requests(local: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    """The data set in memory://bucket/set, small blocks, and no waiting between attempts."""
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote_shards, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote_folder, "FIRST_WAIT_S", 0.0)
    system = fsspec.filesystem("memory")
    system.put(str(local), "/bucket/set", recursive=True)
    seen, cat_file = Requests(), MemoryFileSystem.cat_file

    def watched(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if start is None:
            seen.names.append(path)
        else:
            seen.ranges.append((path, start, end))
        return seen.fail(path, start, cat_file(self, path, start=start, end=end, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", watched)
    yield seen
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def config(tmp_path: Path, **change: Any) -> StorageConfig:
    return StorageConfig(
        **{"cache_dir": str(tmp_path / "cache"), "attempts": 3, "parallel_reads": 4, **change}
    )


def blocks_of(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache/blocks").rglob("*") if path.is_file())


def replace_manifest(**change: Any) -> None:
    """Changes the remote manifest and its digest with it."""
    system = fsspec.filesystem("memory")
    tree = {**json.loads(system.cat("/bucket/set/manifest.json")), **change, "fingerprint": ""}
    tree["fingerprint"] = files.digest(tree)
    system.pipe("/bucket/set/manifest.json", json.dumps(tree).encode())


# Reading ------------------------------------------------------------------------------------------


def test_a_url_gives_the_samples_and_columns_of_the_folder(
    local: Path, requests: Requests, tmp_path: Path
) -> None:
    near, far = ShardDataset.open(local), ShardDataset.open(URL, config(tmp_path))
    order = [*np.random.default_rng(0).permutation(NUM_SAMPLES).tolist(), 3, 3]
    assert far.read(order) == near.read(order) == [make_sample(number) for number in order]
    assert far.fingerprint == near.fingerprint
    for name in ("key_hashes", "num_image_tokens", "num_text_tokens"):
        assert getattr(far, name).tolist() == getattr(near, name).tolist()
    assert str(far.directory) == URL
    assert far.read([0])[0].shard == f"{URL}/shard-000000.tar"


def test_file_url_is_the_folder_itself(local: Path) -> None:
    assert ShardDataset.open(f"file://{local}").read([1]) == [make_sample(1)]


def test_second_epoch_asks_for_nothing(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    dataset.read(range(NUM_SAMPLES))
    asked = len(requests.ranges)
    assert len(set(requests.ranges)) == asked, "a block was fetched twice"
    assert dataset.read(range(NUM_SAMPLES)) == [make_sample(number) for number in range(NUM_SAMPLES)]
    assert len(requests.ranges) == asked
    requests.names.clear()
    again = ShardDataset.open(URL, config(tmp_path))  # of another process: indices and blocks are there
    again.read(range(NUM_SAMPLES))
    assert requests.names == ["/bucket/set/manifest.json"]
    assert len(requests.ranges) == asked + 1  # the check that ranges work


def test_ranges_are_aligned_blocks_inside_the_shard(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    requests.ranges.clear()
    dataset.read([7, 30])
    sizes = {f"/bucket/set/{entry.name}": entry.num_bytes for entry in dataset.manifest.shards}
    for path, start, end in requests.ranges:
        assert start % BLOCK == 0
        assert end == min(start + BLOCK, sizes[path])


def test_what_is_announced_is_fetched_in_the_background(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    requests.ranges.clear()
    first = threading.Barrier(4 + 1)  # all threads are at work at once, and nobody reads

    def meet(path: str, start: int | None, content: bytes) -> bytes:
        if start is not None and len(requests.ranges) <= 4:
            first.wait(timeout=10)
        return content

    requests.fail = meet
    dataset.will_need(range(15))
    first.wait(timeout=10)
    assert dataset.read(range(15)) == [make_sample(number) for number in range(15)]
    assert len(set(requests.ranges)) == len(requests.ranges)


def test_announcements_are_bounded_by_the_cache(requests: Requests, tmp_path: Path) -> None:
    small = config(tmp_path, cache_gib=32 * BLOCK / storage.GIB)
    dataset = ShardDataset.open(URL, small)
    requests.ranges.clear()
    hold = threading.Event()

    def wait(path: str, start: int | None, content: bytes) -> bytes:
        hold.wait(timeout=10)
        return content

    requests.fail = wait
    dataset.will_need(range(NUM_SAMPLES))
    hold.set()
    assert dataset.read([39]) == [make_sample(39)]
    fetched_for_last = {block for block in requests.ranges if "000002" in block[0]}
    assert len(set(requests.ranges) - fetched_for_last) <= 4 + 2  # in flight, and 1/16 of the cache


def test_urgent_blocks_overtake_announced_ones() -> None:
    queue = remote_shards._Queue(max_announced=10)
    for number in range(4):
        queue.announce((0, number))
    assert queue.demand((0, 2)) is queue.demand((0, 2))
    queue.demand((9, 9))
    taken = [queue.take() for _ in range(5)]
    assert [block for block, _ in filter(None, taken)] == [(0, 2), (9, 9), (0, 0), (0, 1), (0, 3)]
    queue.close()
    assert queue.take() is None


def test_threads_end_with_the_data_set(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    dataset.read([0])
    threads = dataset._payloads._threads  # type: ignore[attr-defined]
    del dataset
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


# The cache ----------------------------------------------------------------------------------------


def test_cache_stays_within_its_bound(requests: Requests, tmp_path: Path) -> None:
    num_blocks = 6
    dataset = ShardDataset.open(URL, config(tmp_path, cache_gib=num_blocks * BLOCK / storage.GIB))
    for start in range(0, NUM_SAMPLES, 5):
        numbers = range(start, start + 5)
        assert dataset.read(numbers) == [make_sample(number) for number in numbers]
        assert sum(path.stat().st_size for path in blocks_of(tmp_path)) <= num_blocks * BLOCK


def test_least_recently_used_blocks_go_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, "f", 4 * BLOCK)
    for number in range(3):
        cache.write(("s.tar", number), bytes(BLOCK))
        path = tmp_path / f"blocks/f/s.tar/{number:06d}"
        os.utime(path, (number, number))
    assert cache.read(("s.tar", 0), 0, 1) == b"\0"  # used now
    cache.write(("s.tar", 3), bytes(BLOCK))
    assert [number for number in range(4) if ("s.tar", number) in cache] == [0, 2, 3]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_cached_block_is_fetched_again(requests: Requests, tmp_path: Path, damage: str) -> None:
    ShardDataset.open(URL, config(tmp_path)).read(range(NUM_SAMPLES))
    for path in blocks_of(tmp_path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"flip": content, "truncate": content[:100], "empty": b""}[damage])
    dataset = ShardDataset.open(URL, config(tmp_path))
    expected = [make_sample(number) for number in range(NUM_SAMPLES)]
    assert dataset.read(range(NUM_SAMPLES)) == expected
    requests.ranges.clear()
    assert dataset.read(range(NUM_SAMPLES)) == expected
    assert len(requests.ranges) <= 1  # damage between samples is nobody's business


def test_damage_late_in_a_run_of_samples_is_repaired(requests: Requests, tmp_path: Path) -> None:
    """The samples before it were read already; they must not come twice."""
    dataset = ShardDataset.open(URL, config(tmp_path))
    expected = dataset.read(range(15))
    path = blocks_of(tmp_path)[-2]
    path.write_bytes(bytes(path.stat().st_size))
    assert ShardDataset.open(URL, config(tmp_path)).read(range(15)) == expected


def test_block_damaged_on_the_way_is_fetched_again(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    broken: list[int] = []

    def flip(path: str, start: int | None, content: bytes) -> bytes:
        if start is None or start in broken:
            return content
        broken.append(start)
        return bytes(byte ^ 1 for byte in content)

    requests.fail = flip
    assert dataset.read([3]) == [make_sample(3)]


def test_shard_damaged_in_the_storage_is_named_after_one_more_look(
    requests: Requests, tmp_path: Path
) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    requests.ranges.clear()
    requests.fail = lambda path, start, content: bytes(len(content))
    with pytest.raises(
        UserError, match=r"memory://bucket/set/shard-000000.tar: sample .* at byte 0 is damaged"
    ):
        dataset.read([0])
    assert len(requests.ranges) == 2


def test_two_ranks_share_a_cache_folder(requests: Requests, tmp_path: Path) -> None:
    """Small enough that each deletes what the other reads."""
    small = config(tmp_path, cache_gib=8 * BLOCK / storage.GIB)
    ranks = [ShardDataset.open(URL, small) for _ in range(2)]

    def epochs(rank: int) -> bool:
        for epoch in range(4):
            order = epoch_order(NUM_SAMPLES, ranks[rank].fingerprint, 0, epoch, 1, 0)
            ranks[rank].will_need(order)
            for start in range(0, NUM_SAMPLES, 7):
                numbers = order[start : start + 7]
                assert ranks[rank].read(numbers) == [make_sample(number) for number in numbers.tolist()]
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(epochs, range(2))) == [True, True]
    # Blocks that were announced may still be on their way.
    threads = [thread for rank in ranks for thread in rank._payloads._threads]  # type: ignore[attr-defined]
    ranks.clear()
    for thread in threads:
        thread.join(timeout=10)
    assert not [path for path in blocks_of(tmp_path) if path.name.endswith(".tmp")]


def test_full_disk_goes_on_without_the_cache_and_says_so_once(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (block_cache, remote_folder):
        monkeypatch.setattr(module, "replace_file", full)
    dataset = ShardDataset.open(URL, config(tmp_path))
    for _ in range(2):
        dataset.will_need(range(NUM_SAMPLES))
        assert dataset.read(range(NUM_SAMPLES)) == [make_sample(number) for number in range(NUM_SAMPLES)]
    assert dataset.num_text_tokens.tolist() == list(range(NUM_SAMPLES))
    told = f"{tmp_path}/cache/blocks: cannot cache shards (No space left on device)"
    assert capfd.readouterr().err.count(told) == 1


def test_damaged_cached_index_is_fetched_again(requests: Requests, tmp_path: Path) -> None:
    ShardDataset.open(URL, config(tmp_path))
    (index, *_) = sorted((tmp_path / "cache/indices").rglob("*.npy"))
    index.write_bytes(index.read_bytes()[:-1])
    requests.names.clear()
    ShardDataset.open(URL, config(tmp_path))
    assert requests.names == ["/bucket/set/manifest.json", "/bucket/set/shard-000000.index.npy"]


# Trouble ------------------------------------------------------------------------------------------


def test_transient_trouble_is_tried_again_a_bounded_number_of_times(
    requests: Requests, tmp_path: Path
) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    failures = [ConnectionResetError("reset by peer"), TimeoutError()]

    def fail(path: str, start: int | None, content: bytes) -> bytes:
        if failures:
            raise failures.pop()
        return content

    requests.fail = fail
    assert dataset.read([0]) == [make_sample(0)]
    failures += [ConnectionResetError("reset by peer")] * 3
    with pytest.raises(UserError) as error:
        list(dataset._payloads.read([(2, 0, 100)]))  # one block: all three attempts are its own
    assert str(error.value) == (
        f"{URL}/shard-000002.tar: cannot be read (reset by peer) after 3 attempts; check the storage or the mount"
    )


class StatusError(Exception):
    """An error of a client library: the HTTP status stands in `attribute`, or in its response's."""

    def __init__(self, attribute: str, status: int) -> None:
        super().__init__(f"status {status}")
        if attribute == "response":
            self.response = SimpleNamespace(status_code=status)
        else:
            setattr(self, attribute, status)


@pytest.mark.parametrize("attribute", ["status", "code", "response"])
def test_every_status_of_a_busy_or_broken_server_is_tried_again_and_no_other_one(attribute: str) -> None:
    """RFC 9110 and 6585: 408, 425, 429 and 5xx are of the moment; 404 and 410 say that there is no file."""
    for status in range(400, 600):
        asked = []

        def ask(status: int = status, asked: list[int] = asked) -> bytes:
            asked.append(status)
            if len(asked) < 3:
                raise StatusError(attribute, status)
            return b"content"

        if status >= 500 or status in (408, 425, 429):
            assert retrying(ask, "there", 3, 0.0) == b"content", status
        else:
            with pytest.raises(UserError) as error:
                retrying(ask, "there", 3, 0.0)
            assert isinstance(error.value, storage.MissingFileError) == (status in (404, 410)), status
            assert len(asked) == 1, status


def test_short_answers_are_tried_again(requests: Requests, tmp_path: Path) -> None:
    dataset = ShardDataset.open(URL, config(tmp_path))
    cut = [1, 2]
    requests.fail = lambda path, start, content: content[: -cut.pop()] if cut else content
    assert dataset.read([0]) == [make_sample(0)]
    requests.fail = lambda path, start, content: content[:-1]
    with pytest.raises(UserError, match=r"\d+ of \d+ bytes came. after 3 attempts"):
        dataset.read([39])


def test_waits_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)

    def fail() -> None:
        raise OSError("busy")

    for _ in range(2):
        with pytest.raises(UserError, match="after 5 attempts"):
            retrying(fail, "x", 5, first_wait_s=1.0)
    assert len(waits) == 8
    for number, wait_s in enumerate(waits):
        assert 0.5 <= wait_s / 2 ** (number % 4) <= 1.5
    assert waits[:4] != waits[4:]


def test_missing_files_are_named_and_not_tried_again(requests: Requests, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    with pytest.raises(UserError, match=r"memory://elsewhere/manifest.json: no such data set"):
        ShardDataset.open("memory://elsewhere", config(tmp_path))
    dataset = ShardDataset.open(URL, config(tmp_path))
    system.rm("/bucket/set/shard-000001.tar")
    with pytest.raises(UserError, match=r"set/shard-000001.tar: no such file"):
        dataset.read([20])
    with pytest.raises(UserError, match=r"set/shard-000001.tar: shard is missing"):
        ShardDataset.open(URL, config(tmp_path))


def test_shard_of_another_size_is_named(requests: Requests, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/set/shard-000001.tar", bytes(512))
    with pytest.raises(UserError, match=r"shard-000001.tar: shard has 512 bytes, manifest.json says"):
        ShardDataset.open(URL, config(tmp_path))


def test_index_of_another_shard_is_named(requests: Requests, tmp_path: Path) -> None:
    fsspec.filesystem("memory").copy(
        "/bucket/set/shard-000000.index.npy", "/bucket/set/shard-000001.index.npy"
    )
    with pytest.raises(
        UserError, match=r"shard-000001.index.npy: cannot be read .SHA-256 .* after 3 attempts"
    ):
        ShardDataset.open(URL, config(tmp_path))


def test_damaged_manifest_is_named_by_its_url(requests: Requests, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    tree = json.loads(system.cat("/bucket/set/manifest.json"))
    system.pipe("/bucket/set/manifest.json", json.dumps({**tree, "source": "elsewhere"}).encode())
    with pytest.raises(UserError, match=r"^memory://bucket/set/manifest.json: was changed after"):
        ShardDataset.open(URL, config(tmp_path))


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "a/b.tar", "..", ".tar", "a\\b.tar"])
def test_shard_names_that_lead_elsewhere_are_refused(requests: Requests, tmp_path: Path, name: str) -> None:
    shards = json.loads(fsspec.filesystem("memory").cat("/bucket/set/manifest.json"))["shards"]
    replace_manifest(shards=[{**shards[0], "name": name}, *shards[1:]])
    with pytest.raises(UserError, match="is no plain file name"):
        ShardDataset.open(URL, config(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_index_of_python_objects_is_refused(requests: Requests, tmp_path: Path) -> None:
    """Reading it would run what a stranger pickled."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    fsspec.filesystem("memory").pipe("/bucket/set/shard-000000.index.npy", buffer.getvalue())
    shards = json.loads(fsspec.filesystem("memory").cat("/bucket/set/manifest.json"))["shards"]
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    replace_manifest(shards=[{**shards[0], "index_sha256": sha256}, *shards[1:]])
    with pytest.raises(UserError, match=r"shard-000000.index.npy: not 15 records of this format"):
        ShardDataset.open(URL, config(tmp_path))


def test_urls_that_nobody_opens_are_refused() -> None:
    with pytest.raises(UserError, match=r"^nowhere://x: cannot be opened \(Protocol not known: nowhere"):
        ShardDataset.open("nowhere://user:secret@x")


def test_messages_show_no_secrets() -> None:
    text = redact("403, url='https://me:pa@ss@host/d/x.tar?X-Sig=a,b)c&d=e' and s3://key:secret@bucket/a")
    assert text == "403, url='https://host/d/x.tar' and s3://bucket/a"


# Without a network --------------------------------------------------------------------------------


def test_left_out_shards_need_not_be_there(local: Path, requests: Requests, tmp_path: Path) -> None:
    near = tmp_path / "set"
    shutil.copytree(local, near)
    (near / "shard-000001.tar").unlink()
    fsspec.filesystem("memory").rm("/bucket/set/shard-000001.tar")
    for location in (near, URL):
        dataset = ShardDataset.open(location, config(tmp_path), leave_out=["shard-000001.tar"])
        assert len(dataset) == 25
        assert dataset.read([14, 15]) == [make_sample(14), make_sample(30)]
        with pytest.raises(UserError, match=r"has no shard 'other.tar'"):
            ShardDataset.open(location, config(tmp_path), leave_out=["other.tar"])


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    """A memory map holds a descriptor: of 1,100 shards they cannot all be mapped at once."""
    names = [f"shard-{number:06d}.tar" for number in range(80)]
    with ShardWriter(tmp_path / "set", max_samples_per_shard=1, source="test") as writer:
        for number in range(80):
            writer.write(make_sample(number), num_text_tokens=number)
    write_manifest(tmp_path / "set", names, source="test")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
        dataset = ShardDataset.open(tmp_path / "set")
        assert dataset.num_text_tokens.tolist() == list(range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "change", [{"attempts": 0}, {"parallel_reads": 0}, {"cache_gib": 0.0}, {"timeout_s": -1.0}]
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        StorageConfig(**change)


def test_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert StorageConfig().cache == Path("/somewhere/rpiae/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert StorageConfig().cache == Path.home() / ".cache/rpiae/shards"
