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
from pathlib import Path
from typing import Protocol, TypeVar

import aiohttp

from base.config import UserError
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
