"""JSON-lines files that a running training appends to, and the handling of writes that fail."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from base import files


class JsonLines:
    """Appends whole lines to a file, which stays open. A file deleted or replaced meanwhile is opened anew."""

    def __init__(self, path: Path) -> None:
        """Drops the half line that a killed process may have left at the end. Raises OSError."""
        self._path = path
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            files.write_bytes(path, content[: content.rfind(b"\n") + 1])
        self._descriptor = -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes `row` as one line. Raises OSError; no part of the line is then left in the file."""
        payload = memoryview(json.dumps(row).encode() + b"\n")
        if not self._is_open():
            self.close()
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        before = os.fstat(self._descriptor).st_size
        try:
            while payload:
                payload = payload[os.write(self._descriptor, payload) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Closes the file. A second call does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = -1

    def _is_open(self) -> bool:
        """Whether the open file is still the file at the path."""
        try:
            there, here = self._path.stat(), os.fstat(self._descriptor)
        except OSError:
            return False
        return os.path.samestat(there, here)


class Expendable:
    """Context of writes that a training can do without: a failed write is reported once a file and ends nothing."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """`name`: the file's name in the run folder, or that of the folder that holds such files."""
        try:
            yield
        except OSError as error:
            if name not in self._told:
                self._told.add(name)
                self._tell(
                    f"WARNING: {name} cannot be written: {files.reason(error)}; the training goes on without"
                )
