"""Files of JSON lines that a training writes while it goes on, and what becomes of it when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from base import files


class JsonLines:
    """Appends whole lines. The file stays open; one that was deleted or replaced meanwhile is opened anew."""

    def __init__(self, path: Path) -> None:
        """Drops the half line that a killed process may have left at the end. Raises OSError."""
        self._path = path
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            files.write_bytes(path, content[: content.rfind(b"\n") + 1])
        self._descriptor = -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes `row`. Raises OSError, and then leaves no part of it."""
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
        """May be called again."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = -1

    def _is_open(self) -> bool:
        """Whether what is open is what stands at the path."""
        try:
            there, here = self._path.stat(), os.fstat(self._descriptor)
        except OSError:
            return False
        return os.path.samestat(there, here)


class Expendable:
    """Around each write that a training can do without: one that fails is told, once a file, and ends nothing."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """`name`: of the file, or of the folder of files of one kind, in the run folder."""
        try:
            yield
        except OSError as error:
            if name not in self._told:
                self._told.add(name)
                self._tell(
                    f"WARNING: {name} cannot be written: {files.reason(error)}; the training goes on without"
                )
