"""Where shards are kept: local folders, or anything fsspec opens; settings, retries."""

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
# What no second attempt repairs. Every client library has exceptions of its own: all others are tried again.
PERMANENT = (PermissionError, NotADirectoryError, IsADirectoryError, ImportError)
MISSING_STATUS = {404, 410}  # of HTTP
PERMANENT_STATUS = set(range(400, 500)) - {408, 425, 429}  # too early, too many: later

Range = tuple[int, int, int]  # shard, first byte, number of bytes
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StorageConfig:
    """How remote shards (s3://, gs://, https://, hf://, ...) are read. Local folders need none of it."""

    cache_dir: str | None = None
    """Folder on a local disk for blocks of shards; the ranks of a node share it. None: in the user's cache folder."""
    cache_gib: Weight = 50.0
    """Room for blocks there, GiB. The indices, 76 bytes a sample, come on top and stay."""
    attempts: Few = 5
    """Of one request, with growing waits between them, before the run ends."""
    timeout_s: Seconds = 60.0
    """Of one attempt, where the storage's client lets it be set."""
    parallel_reads: Few = 8
    """Requests in flight, of each data set and rank."""

    def __post_init__(self) -> None:
        for name in ("attempts", "parallel_reads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("cache_gib", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, not {getattr(self, name)}")

    @property
    def cache(self) -> Path:
        """The cache folder."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpiae" / "shards"


class MissingFileError(UserError):
    """A file that is not there."""


class ShardBytes(Protocol):
    """The bytes of a data set's shards. Safe to use from several threads."""

    def read(self, ranges: Sequence[Range]) -> Iterator[bytes | memoryview]:
        """Exactly these bytes, range by range; each may be overwritten when the next is asked for.

        Raises UserError: the storage fails for good, a shard is shorter.
        """

    def will_need(self, ranges: Sequence[Range]) -> None:
        """A hint that these bytes are read soon."""

    def forget(self, block: Range) -> bool:
        """Drops copies of these bytes. False: there are none, reading again gives the same."""


def is_remote(location: str | Path) -> bool:
    """Whether `location` is a url of something else than a local file."""
    return "://" in str(location) and not str(location).startswith("file://")


def retrying(action: Callable[[], Result], where: str, attempts: int, first_wait_s: float) -> Result:
    """What `action` returns; trouble with the storage is tried again after growing, random waits.

    Raises UserError, one line with `where`, the number of attempts and the reason; at once what `action` raises as
    UserError and what no second attempt repairs. MissingFileError: no such file.
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
                ) from None  # the original may show secrets
        # All ranks fail together; they must not come back together.
        wait_s = min(MAX_WAIT_S, first_wait_s * 2 ** (attempt - 1))
        time.sleep(wait_s * random.SystemRandom().uniform(0.5, 1.5))
    raise AssertionError


def in_threads(action: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> list[Result]:
    """`action` of every item, in order; the first error in that order ends it, without starting the rest."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        return list(pool.map(action, items))
    finally:
        pool.shutdown(cancel_futures=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file of a cache, whole or not at all, whoever else writes it. Unlike `base.files`, not for good."""
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
    """What went wrong. fsspec's http says "no such file" for everything that stops it from finding a size."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(
        cause, (aiohttp.ClientError, asyncio.TimeoutError)
    ):
        return cause
    return error


def _statuses(error: BaseException) -> set[object]:
    """The HTTP status of an exception, wherever its library keeps it."""
    response = getattr(error, "response", None)
    candidates = (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    )
    return {status for status in candidates if isinstance(status, int)}
