"""Storage of shards, in local folders or anything that fsspec opens: settings, interface, retries."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import aiohttp

from base.bounds import Few, Seconds, Weight
from base.config import ConfigError, UserError
from base.redaction import redact

GIB = 1 << 30
MAX_WAIT_S = 30.0
# Errors that no second attempt repairs. All others are retried, because every client library has its own exceptions.
PERMANENT = (PermissionError, NotADirectoryError, IsADirectoryError, ImportError)
MISSING_STATUS = {404, 410}  # HTTP
PERMANENT_STATUS = set(range(400, 500)) - {408, 425, 429}  # timeout, too early, too many requests

Range = tuple[int, int, int]  # shard, first byte, number of bytes
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StorageConfig:
    """Settings for reading remote shards (s3://, gs://, https://, hf://, ...). Local folders ignore them."""

    cache_dir: str | None = None
    """Folder on a local disk for cached blocks, which the ranks of a node share; None: in the user's cache folder."""
    cache_gib: Weight = 50.0
    """Bound of the cached blocks, GiB. The indices (76 bytes a sample) come on top and are never evicted."""
    attempts: Few = 5
    """Attempts of one request, with growing waits between them, before the run ends."""
    timeout_s: Seconds = 60.0
    """Time limit of one attempt, if the storage's client has such a setting."""
    parallel_reads: Few = 8
    """Requests in flight for each data set and rank."""

    def __post_init__(self) -> None:
        for name in ("attempts", "parallel_reads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("cache_gib", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, not {getattr(self, name)}")

    @property
    def cache(self) -> Path:
        """The cache folder: `cache_dir`, or rpiae/shards in the user's cache folder."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpiae" / "shards"


class MissingFileError(UserError):
    """A file does not exist in the storage."""


class ShardBytes(Protocol):
    """The bytes of a data set's shards. Several threads may use it."""

    def read(self, ranges: Sequence[Range]) -> Iterator[bytes | memoryview]:
        """Yields exactly the bytes of each range; the next one may overwrite them.

        Raises UserError: the storage fails permanently, or a shard is shorter.
        """

    def will_need(self, ranges: Sequence[Range]) -> None:
        """A hint that these bytes will be read soon."""

    def forget(self, block: Range) -> bool:
        """Drops copies of these bytes. Returns False if there were none: another read would give equal bytes."""


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a url of anything but a local file."""
    return "://" in str(location) and not str(location).startswith("file://")


def retrying(action: Callable[[], Result], where: str, attempts: int, first_wait_s: float) -> Result:
    """Returns `action()`, which is repeated after growing, random waits while the storage fails.

    Raises UserError (one line with `where`, the number of attempts and the reason) after the last attempt, and at once
    for an error that no attempt repairs or a UserError of `action`. Raises MissingFileError: no such file.
    """
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            trouble = _trouble(error)
            statuses = _statuses(trouble)
            if isinstance(trouble, FileNotFoundError) or not statuses.isdisjoint(MISSING_STATUS):
                raise MissingFileError(
                    f"{redact(where)}: no such file; check the storage or the mount"
                ) from None
            is_permanent = isinstance(trouble, PERMANENT) or not statuses.isdisjoint(PERMANENT_STATUS)
            if attempt == attempts or is_permanent:
                reason = redact(" ".join(str(trouble).split())) or type(trouble).__name__
                times = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise UserError(
                    f"{redact(where)}: cannot be read ({reason}) after {times}; check the storage or the mount"
                ) from None  # the original error may contain secrets
        # All ranks fail at one time; random waits keep them from returning at one time.
        wait_s = min(MAX_WAIT_S, first_wait_s * 2 ** (attempt - 1))
        time.sleep(wait_s * random.SystemRandom().uniform(0.5, 1.5))
    raise AssertionError


def in_threads(action: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> list[Result]:
    """`action(item)` for every item, in order. The first error in that order is raised; waiting items are dropped."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        return list(pool.map(action, items))
    finally:
        pool.shutdown(cancel_futures=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a cache's file, whole or not at all, even if others write it, too. Unlike base.files, without fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _trouble(error: Exception) -> BaseException:
    """The real cause of `error`: fsspec's http reports "no such file" for every failure to find a file's size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(
        cause, (aiohttp.ClientError, asyncio.TimeoutError)
    ):
        return cause
    return error


def _statuses(error: BaseException) -> set[object]:
    """The HTTP statuses that an exception carries, in any attribute that client libraries use."""
    response = getattr(error, "response", None)
    candidates = (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    )
    return {status for status in candidates if isinstance(status, int)}
