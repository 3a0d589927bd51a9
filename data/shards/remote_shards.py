"""Reads remote shards as aligned blocks, which are fetched ahead and cached on a local disk."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from data.shards.block_cache import BLOCK_BYTES, BlockCache
from data.shards.index import ShardEntry
from data.shards.remote_folder import RemoteFolder
from data.shards.storage import Range

# Share of the cache that one rank announces ahead: all ranks of a node together must not evict blocks about to be read.
ANNOUNCED_SHARE = 1 / 16
Block = tuple[int, int]  # shard, number of the block in it


class RemoteShards:
    """Implements ShardBytes for an fsspec url."""

    def __init__(
        self, folder: RemoteFolder, shards: Sequence[ShardEntry], cache: BlockCache, num_threads: int
    ) -> None:
        self._folder = folder
        self._shards = shards
        self._cache = cache
        self._queue = _Queue(max_announced=int(cache.max_bytes * ANNOUNCED_SHARE / BLOCK_BYTES) or 1)
        # The threads hold no reference to this object, so they end when it is deleted.
        fetch = functools.partial(_fetch, folder, shards, cache)
        self._threads = [
            threading.Thread(target=_work, args=(self._queue, fetch), name="shard blocks", daemon=True)
            for _ in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __del__(self) -> None:
        if hasattr(self, "_queue"):
            self._queue.close()

    def read(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """See ShardBytes. Missing blocks are fetched in parallel, before all announced blocks."""
        coming: dict[Block, Future[bytes | None]] = {}
        if self._cache.is_writable:
            coming = {block: self._queue.demand(block) for block in self._missing(ranges)}
        for shard, start, num_bytes in ranges:
            pieces = [self._piece(*piece, coming) for piece in _cut(shard, start, num_bytes)]
            yield pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def will_need(self, ranges: Sequence[Range]) -> None:
        """See ShardBytes. Fetches the blocks in the background, up to a share of the cache."""
        if self._cache.is_writable:
            for block in self._missing(ranges):
                self._queue.announce(block)

    def forget(self, block: Range) -> bool:
        """See ShardBytes."""
        for shard, number, _, _ in _cut(*block):
            self._cache.drop((self._shards[shard].name, number))
        return True

    def _missing(self, ranges: Sequence[Range]) -> Iterator[Block]:
        blocks = dict.fromkeys((shard, number) for r in ranges for shard, number, _, _ in _cut(*r))
        for shard, number in blocks:
            if (self._shards[shard].name, number) not in self._cache:
                yield shard, number

    def _piece(
        self, shard: int, number: int, start: int, num_bytes: int, coming: dict[Block, Future[bytes | None]]
    ) -> bytes:
        """`num_bytes` from `start` of one block, from the cache or a request in flight."""
        name = self._shards[shard].name
        piece = self._cache.read((name, number), start, num_bytes)
        if piece is None and self._cache.is_writable:
            future = coming.get((shard, number)) or self._queue.demand((shard, number))
            block = future.result()
            if block is not None:
                return block[start : start + num_bytes]
            piece = self._cache.read((name, number), start, num_bytes)
        # Without a cache, or if the block is evicted again already, only the needed bytes are fetched.
        return self._folder.part(name, number * BLOCK_BYTES + start, num_bytes) if piece is None else piece


def _cut(shard: int, start: int, num_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (shard, block number, first byte in the block, bytes) for every block that the range touches."""
    end = start + num_bytes
    for number in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
        first = number * BLOCK_BYTES
        begin = max(start, first)
        yield shard, number, begin - first, min(end, first + BLOCK_BYTES) - begin


def _fetch(
    folder: RemoteFolder, shards: Sequence[ShardEntry], cache: BlockCache, block: Block
) -> bytes | None:
    """Fetches a whole block into the cache; returns the block if the cache is not writable, else None."""
    shard, number = block
    entry, start = shards[shard], number * BLOCK_BYTES
    content = folder.part(entry.name, start, min(BLOCK_BYTES, entry.num_bytes - start))
    return None if cache.write((entry.name, number), content) else content


class _Queue:
    """Blocks to fetch. Demanded blocks come before announced ones, and each block is fetched once for all waiters."""

    def __init__(self, max_announced: int) -> None:
        self._max_announced = max_announced
        self._changed = threading.Condition()
        self._is_closed = False
        self._urgent: dict[Block, None] = {}  # in order of arrival
        self._announced: dict[Block, None] = {}
        self._futures: dict[Block, Future[bytes | None]] = {}  # queued or being fetched

    def announce(self, block: Block) -> None:
        """Queues `block`, unless the queue is full."""
        with self._changed:
            if block not in self._futures and len(self._announced) < self._max_announced:
                self._futures[block] = Future()
                self._announced[block] = None
                self._changed.notify()

    def demand(self, block: Block) -> Future[bytes | None]:
        """Queues `block` before all announced ones. The future yields its bytes; None: they are in the cache."""
        with self._changed:
            if block not in self._futures:
                self._futures[block] = Future()
                self._urgent[block] = None
                self._changed.notify()
            elif block in self._announced:
                del self._announced[block]
                self._urgent[block] = None
            return self._futures[block]

    def take(self) -> tuple[Block, Future[bytes | None]] | None:
        """Waits for the next block and returns it; None: the queue is closed."""
        with self._changed:
            while not self._is_closed:
                waiting = self._urgent or self._announced
                if waiting:
                    block = next(iter(waiting))
                    del waiting[block]
                    return block, self._futures[block]
                self._changed.wait()
            return None

    def finish(self, block: Block) -> None:
        """Forgets a fetched block, so that the next demand fetches it again."""
        with self._changed:
            del self._futures[block]

    def close(self) -> None:
        """Ends the threads after their requests in flight."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _work(queue: _Queue, fetch: Callable[[Block], bytes | None]) -> None:
    while (taken := queue.take()) is not None:
        block, future = taken
        try:
            content = fetch(block)
        except BaseException as error:
            queue.finish(block)
            future.set_exception(error)
        else:
            queue.finish(block)
            future.set_result(content)
            del content
        del taken, future
