"""Reads files of an fsspec url with retries; fetches a data set's manifest, sizes and indices."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import fsspec
import fsspec.asyn
from fsspec.implementations.http import HTTPFileSystem

from base import files, limits
from base.config import UserError
from base.redaction import redact
from data.config import StorageConfig
from data.shards.index import MANIFEST_NAME, RECORD, Manifest, Records, ShardEntry
from data.shards.index_files import MAX_HEAD_BYTES, load_index
from data.shards.storage import MissingFileError, in_threads, replace_file, retrying

FIRST_WAIT_S = 0.5
UPLOAD = "upload this data set again"
T = TypeVar("T")


class RemoteFolder:
    """The files below an fsspec url. A failed request is repeated."""

    def __init__(self, url: str, config: StorageConfig) -> None:
        """Raises UserError: the url's protocol is unknown or needs another package."""
        self.url = redact(url).rstrip("/")  # printable
        self.config = config
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot be opened ({redact(str(error))})") from None
        self._query = ""
        if url.startswith(("http://", "https://")):  # the query of a signed url applies to every file
            root, mark, query = root.partition("?")
            self._query = mark + query
        self._root = root.rstrip("/")
        self._options = {"timeout": config.timeout_s} if getattr(self._files, "async_impl", False) else {}

    def content(
        self, name: str, limit_bytes: int, is_right: Callable[[bytes], bool] = lambda _: True
    ) -> bytes:
        """A whole file. If `is_right` refuses it, the transfer has damaged it and it is fetched again.

        Raises UserError: the file has more than `limit_bytes`, or no end.
        """

        def action() -> bytes:
            content = self._cat(name, None, limit_bytes + 1)
            if len(content) > limit_bytes:
                found = limits.too_large(self.url, "more", limit_bytes).strerror
                raise UserError(f"{self.url}/{name}: cannot be read ({found}); {UPLOAD}")
            if not is_right(content):
                raise OSError(f"SHA-256 is not the one in {MANIFEST_NAME}")
            return content

        return self._retrying(action, name)

    def part(self, name: str, start: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes from `start` of a file. Raises UserError: the server ignores ranges."""

        def action() -> bytes:
            content = self._cat(name, start, start + num_bytes)
            if len(content) > num_bytes:
                raise UserError(
                    f"{self.url}/{name}: the server sends whole files instead of the range that was asked for; "
                    "use one that supports HTTP range requests, or copy the data set"
                )
            if len(content) < num_bytes:
                raise OSError(f"{len(content)} of {num_bytes} bytes came")
            return content

        return self._retrying(action, name)

    def num_bytes(self, name: str) -> int:
        """Size of a file in bytes. Raises UserError: the server does not tell it."""
        info = self._retrying(lambda: self._files.info(self._path(name), **self._options), name)
        if info["size"] is None:
            raise UserError(
                f"{self.url}/{name}: the server does not tell its size (Content-Length); "
                "use another server, or copy the data set"
            )
        return int(info["size"])

    def _cat(self, name: str, start: int | None, end: int) -> bytes:
        """Bytes from `start` (None: the first) to `end`. A server that ignores ranges yields some more, never all."""
        if isinstance(self._files, HTTPFileSystem):
            return bytes(fsspec.asyn.sync(self._files.loop, self._stream, self._path(name), start, end))
        return bytes(self._files.cat_file(self._path(name), start=start, end=end, **self._options))

    async def _stream(self, path: str, start: int | None, end: int) -> bytearray:
        """Replaces HTTPFileSystem.cat_file, which would wait for the end of an endless body."""
        session = await self._files.set_session()
        options = {**self._files.kwargs, **self._options}
        if start is not None:
            options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        content = bytearray()
        async with session.get(self._files.encode_url(path), **options) as reply:
            self._files._raise_not_found_for_status(reply, path)
            async for chunk in reply.content.iter_chunked(limits.CHUNK_BYTES):
                content += chunk
                if len(content) > end - (start or 0):
                    break
        return content

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}{self._query}"

    def _retrying(self, action: Callable[[], T], name: str) -> T:
        return retrying(action, f"{self.url}/{name}", self.config.attempts, FIRST_WAIT_S)


def read_manifest(folder: RemoteFolder) -> Manifest:
    """Fetches and checks the manifest. Raises UserError: as Manifest.read, or the server ignores ranges."""
    try:
        content = folder.content(MANIFEST_NAME, limits.DOCUMENT_BYTES)
    except MissingFileError:
        raise UserError(
            f"{folder.url}/{MANIFEST_NAME}: no such data set; upload it, or check the url and the credentials"
        ) from None
    folder.part(MANIFEST_NAME, 0, 1)
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / MANIFEST_NAME).write_bytes(content)
        try:
            return Manifest.read(Path(copy))
        except UserError as error:
            raise UserError(str(error).replace(copy, folder.url)) from None


def check_sizes(folder: RemoteFolder, shards: Sequence[ShardEntry]) -> None:
    """Checks all shards. Raises UserError: a shard is missing or of another size."""

    def check(entry: ShardEntry) -> None:
        try:
            num_bytes = folder.num_bytes(entry.name)
        except MissingFileError:
            raise UserError(f"{folder.url}/{entry.name}: shard is missing; {UPLOAD}") from None
        if num_bytes != entry.num_bytes:
            raise UserError(
                f"{folder.url}/{entry.name}: shard has {num_bytes} bytes, {MANIFEST_NAME} says "
                f"{entry.num_bytes}; {UPLOAD}"
            )

    in_threads(check, shards, folder.config.parallel_reads)


def fetch_indices(folder: RemoteFolder, shards: Sequence[ShardEntry], cache: Path) -> list[Path | Records]:
    """A checked local copy of every shard's index, or its records if `cache` is not writable. Raises UserError."""

    def fetch(entry: ShardEntry) -> Path | Records:
        path, where = cache / entry.index_name, f"{folder.url}/{entry.index_name}"
        with contextlib.suppress(OSError):
            if files.sha256(path) == entry.index_sha256:
                load_index(path, entry.num_samples, where)
                return path
        content = folder.content(
            entry.index_name,
            MAX_HEAD_BYTES + entry.num_samples * RECORD.itemsize,
            lambda found: hashlib.sha256(found).hexdigest() == entry.index_sha256,
        )
        records = load_index(content, entry.num_samples, where)
        try:
            replace_file(path, content)
        except OSError:
            return records
        return path

    return in_threads(fetch, shards, folder.config.parallel_reads)
