"""A recorded file system: numbers what a write does to the disk, lets any operation fail, and lets the power go after
any. The model of a crash is the abstract persistence model of Pillai et al., "All File Systems Are Not Created Equal",
OSDI 2014.

What a crash keeps:
- The bytes of a file as they were at its last fsync. Later bytes are kept, lost, cut in half or zeroed.
- The names of a directory as they were at its last fsync. Of the later changes (create, rename, unlink) all are kept,
  none is kept, or any single one is missing: a file system may reorder them.

Only Python's own calls are seen (`open`, pathlib, shutil and `os`); a library in C that opens files by itself is not.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from base.config import UserError

Tree = dict[str, bytes | None]
"""Relative path -> a file's content; None: a directory."""
CONTENTS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "kept": lambda written, flushed: written,
    "lost": lambda written, flushed: flushed,
    "cut": lambda written, flushed: written[: len(written) // 2],
    "zeroed": lambda written, flushed: bytes(len(written)),
}
"""What a crash may leave of a file whose bytes `written` were not flushed since they were `flushed`."""


@dataclass(eq=False)
class _Node:
    """A file or a directory, whatever its names are."""

    is_directory: bool
    written: bytes = b""
    flushed: bytes = b""
    names: dict[str, _Node] = field(default_factory=dict)  # of a directory, as its last fsync left them


_Naming = tuple[
    _Node, str, _Node | None
]  # directory, name, what the name leads to from now on (None: nothing)


class RecordedDisk:
    """The operations below `root` while `recording`, and every state in which a crash may leave the folder."""

    def __init__(
        self,
        root: Path,
        *,
        fail_at: int | None = None,
        lasting: bool = False,
        flip_at: tuple[int, int] | None = None,
    ):
        """`fail_at`: the number of an operation that raises EIO, `lasting`: and all after it; `flip_at`: the number
        of a write that reports success, and the byte of it of which one bit is stored wrong.
        """
        self.operations: list[str] = []
        self.crashes: dict[frozenset[tuple[str, bytes | None]], str] = {}
        """Each different tree that a crash may leave, and how it comes about."""
        self._fail_at, self._lasting, self._flip_at = fail_at, lasting, flip_at
        self._lock = threading.RLock()
        self._nodes: dict[tuple[int, int], _Node] = {}
        self._changes: list[tuple[str, list[_Naming]]] = []  # of names, since the fsync of their directories
        self._root = self._found(root)
        self._collect("before the first operation")

    def after_the_end(self) -> dict[frozenset[tuple[str, bytes | None]], str]:
        """The trees that a crash may leave now."""
        crashes, self.crashes = self.crashes, {}
        self._collect("after the end")
        crashes, self.crashes = self.crashes, crashes
        return crashes

    @contextlib.contextmanager
    def recording(self) -> Iterator[RecordedDisk]:
        """Records the operations of the block, in all threads. What is flushed does not wait for the real disk."""
        with contextlib.ExitStack() as stack:

            def patch(module: Any, name: str, wrapper: Callable[..., Any]) -> None:
                real = getattr(module, name)
                stack.enter_context(
                    mock.patch.object(module, name, lambda *args, **kwargs: wrapper(real, *args, **kwargs))
                )

            patch(io, "open", self._io_open)
            patch(builtins, "open", self._io_open)
            patch(os, "open", self._os_open)
            patch(os, "write", self._os_write)
            patch(os, "fsync", self._fsync)
            for name in ("rename", "replace"):
                patch(os, name, self._rename)
            for name in ("unlink", "remove", "rmdir"):
                patch(os, name, self._remove)
            patch(os, "mkdir", self._mkdir)
            patch(os, "link", self._link)
            yield self

    def _io_open(
        self, real: Any, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any
    ) -> Any:
        named = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | kwargs
        is_path = not isinstance(file, int)
        if not (is_path and set(mode) & set("wax+")) or self._directory(os.fspath(file)) is None:
            return real(file, mode, buffering, *args, **kwargs)
        raw = self._opened(
            os.fspath(file), None, "w" in mode, lambda: _RecordedFile(self, file, mode.replace("t", ""))
        )
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **named)

    def _os_open(
        self, real: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC) or self._directory(path, dir_fd) is None:
            return real(path, flags, mode, dir_fd=dir_fd)
        return self._opened(
            path, dir_fd, bool(flags & os.O_TRUNC), lambda: real(path, flags, mode, dir_fd=dir_fd)
        )

    def _opened(self, path: Any, dir_fd: int | None, cuts: bool, action: Callable[[], Any]) -> Any:
        """Opens a file for writing, which creates it, or cuts it to nothing, or leaves it as it is."""
        with self._lock:
            parent, name = self._directory(path, dir_fd), _name(path)
            try:
                known = self._nodes.get(_key(os.stat(path, dir_fd=dir_fd)))
            except FileNotFoundError:
                known = None
            if known is not None and not cuts:
                return action()
            with self._operation("cut" if known else "create", name):
                opened = action()
                if known is None:
                    node = self._nodes[_key(os.stat(path, dir_fd=dir_fd))] = _Node(False)
                    self._changes.append((f"create {name}", [(parent, name, node)]))
                else:
                    known.written = b""
            return opened

    def _os_write(self, real: Any, descriptor: int, data: Any) -> int:
        node = self._nodes.get(_key(os.fstat(descriptor)))
        if node is None:
            return real(descriptor, data)
        return self.write(
            node, os.lseek(descriptor, 0, os.SEEK_CUR), data, lambda part: real(descriptor, part)
        )

    def write(self, node: _Node, position: int, data: Any, action: Callable[[bytes], int]) -> int:
        """Writes `data` by `action`. A write that fails has written half of it."""
        payload = bytes(data)

        def store(part: bytes) -> None:
            action(part)
            before = node.written[:position].ljust(position, b"\0")
            node.written = before + part + node.written[position + len(part) :]

        with self._lock:
            if self._flip_at is not None and len(self.operations) == self._flip_at[0]:
                byte = self._flip_at[1]
                payload = payload[:byte] + bytes([payload[byte] ^ 1]) + payload[byte + 1 :]
            with self._operation(
                "write", f"{len(payload)} bytes", lambda: store(payload[: len(payload) // 2])
            ):
                store(payload)
        return len(payload)

    def _fsync(self, real: Any, descriptor: int) -> None:
        with self._lock:
            node = self._nodes.get(_key(os.fstat(descriptor)))
            if node is None:
                return
            with self._operation("fsync", "directory" if node.is_directory else "file"):
                node.flushed = node.written
                for _, namings in self._changes:
                    for directory, name, target in namings:
                        if directory is node:
                            _assign(node.names, name, target)
                    namings[:] = [naming for naming in namings if naming[0] is not node]
                self._changes = [change for change in self._changes if change[1]]

    def _rename(
        self, real: Any, source: Any, target: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None
    ) -> None:
        with self._lock:
            origin, goal = self._directory(source, src_dir_fd), self._directory(target, dst_dir_fd)
            if origin is None or goal is None:
                return real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            node = self._nodes[_key(os.stat(source, dir_fd=src_dir_fd))]
            if _is_there(target, dst_dir_fd):  # its number may be given to another one
                self._nodes.pop(_key(os.stat(target, dir_fd=dst_dir_fd)))
            with self._operation("rename", f"{_name(source)} to {_name(target)}") as change:
                real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
                namings = [(origin, _name(source), None), (goal, _name(target), node)]
                self._changes.append((change, namings))
        return None

    def _remove(self, real: Any, path: Any, *, dir_fd: int | None = None) -> None:
        with self._lock:
            parent = self._directory(path, dir_fd)
            if parent is None or not _is_there(path, dir_fd):
                return real(path, dir_fd=dir_fd)
            with self._operation("remove", _name(path)) as change:
                key = _key(os.stat(path, dir_fd=dir_fd, follow_symlinks=False))
                is_directory = self._nodes[key].is_directory
                real(path, dir_fd=dir_fd)
                if is_directory:  # its number may be given to another one
                    del self._nodes[key]
                self._changes.append((change, [(parent, _name(path), None)]))
        return None

    def _mkdir(self, real: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._lock:
            parent = self._directory(path, dir_fd)
            if parent is None or _is_there(path, dir_fd):
                return real(path, mode, dir_fd=dir_fd)
            with self._operation("mkdir", _name(path)) as change:
                real(path, mode, dir_fd=dir_fd)
                node = self._nodes[_key(os.stat(path, dir_fd=dir_fd))] = _Node(True)
                self._changes.append((change, [(parent, _name(path), node)]))
        return None

    def _link(self, real: Any, source: Any, target: Any, **kwargs: Any) -> None:
        with self._lock:
            parent, node = self._directory(target), self._nodes.get(_key(Path(source).stat()))
            if parent is None or node is None:
                return real(source, target, **kwargs)
            with self._operation("link", _name(target)) as change:
                real(source, target, **kwargs)
                self._changes.append((change, [(parent, _name(target), node)]))
        return None

    @contextlib.contextmanager
    def _operation(self, what: str, where: str, half: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Numbers an operation, lets it fail (after doing `half` of it), and looks at what a crash after it leaves."""
        number = len(self.operations)
        text = f"{what} {where}"
        self.operations.append(text)
        if self._fail_at is not None and (
            number == self._fail_at or (self._lasting and number > self._fail_at)
        ):
            half()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield text
        self._collect(f"after operation {number}, {text}")

    def _collect(self, when: str) -> None:
        namings = {"no later name": [], "every later name": [change for _, change in self._changes]}
        for number, (text, _) in enumerate(self._changes):
            namings[f"every later name but '{text}'"] = [
                change for other, (_, change) in enumerate(self._changes) if other != number
            ]
        for names, kept in namings.items():
            later: dict[_Node, dict[str, _Node]] = {}
            for directory, name, target in (naming for change in kept for naming in change):
                _assign(later.setdefault(directory, dict(directory.names)), name, target)
            for content, chosen in CONTENTS.items():
                tree: Tree = {}
                _walk(self._root, "", later, chosen, tree)
                self.crashes.setdefault(
                    frozenset(tree.items()), f"{when}: {names}, bytes that are not flushed {content}"
                )

    def node_of(self, descriptor: int) -> _Node:
        """The node of an open file."""
        return self._nodes[_key(os.fstat(descriptor))]

    def _directory(self, path: Any, dir_fd: int | None = None) -> _Node | None:
        """The directory that holds the name `path`; None: it lies elsewhere."""
        parent = Path(os.fsdecode(path)).parent
        try:
            return self._nodes.get(_key(os.stat(parent, dir_fd=dir_fd)))
        except OSError:
            return None

    def _found(self, path: Path) -> _Node:
        """A file or folder that is there before the recording, flushed."""
        node = self._nodes[_key(path.stat())] = _Node(path.is_dir())
        if node.is_directory:
            node.names = {child.name: self._found(child) for child in path.iterdir()}
        else:
            node.written = node.flushed = path.read_bytes()
        return node


class _RecordedFile(io.FileIO):
    """A file that is open for writing; Python's buffer lies above it, so that a write here is one of the kernel's."""

    def __init__(self, disk: RecordedDisk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        position = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        return self._disk.write(self._disk.node_of(self.fileno()), position, data, super().write)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        node = self._disk.node_of(self.fileno())
        with self._disk._lock, self._disk._operation("truncate", f"to {size} bytes"):
            super().truncate(size)
            node.written = node.written[:size].ljust(size, b"\0")
        return size


def rebuild(tree: Tree, folder: Path) -> Path:
    """Makes `folder`, anew, hold `tree`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in sorted(tree.items(), key=lambda item: item[0]):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder


def read_tree(folder: Path) -> Tree:
    """The content of a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def check_order_of_writing(
    folder: Path,
    prepare: Callable[[Path], object],
    write: Callable[[Path], object],
    judge: Callable[[Path], str],
    allowed: tuple[str, ...] = ("old", "new"),
) -> list[str]:
    """The rule: whatever operation of `write` fails or is the last before a power loss, a reader finds old or new.

    `prepare` makes the old state in an empty folder. `judge` reads a folder as the readers do, says "old", "new" or
    another word of `allowed`, and raises AssertionError for what it must not find. Two more promises belong to the
    rule. Once `write` has returned, the new state survives a power loss. After any failure, `write` again makes the
    new state. Returns the operations of `write`.
    """
    root = folder / "disk"
    root.mkdir()
    judged: set[frozenset[tuple[str, bytes | None]]] = set()
    checked: set[frozenset[tuple[str, bytes | None]]] = set()

    def check(tree: frozenset[tuple[str, bytes | None]], when: str, *, again: bool = False) -> None:
        """Judges a tree; `again`: and writes once more. Each tree once."""
        if tree in checked or (tree in judged and not again):
            return
        (checked if again else judged).add(tree)
        found = _judged(judge, rebuild(dict(tree), root), when)
        assert found in allowed, f"{when}: {found}"
        if again:
            try:
                write(root)
            except (OSError, UserError) as error:
                raise AssertionError(f"{when}: cannot be written again: {error}") from error
            found = _judged(judge, root, when)
            assert found == "new", f"{when}, written again: {found}"

    with mock.patch.object(os, "fsync", lambda descriptor: None):
        prepare(root)
        before = read_tree(root)
        disk = RecordedDisk(root)
        with disk.recording():
            write(root)
        assert judge(root) == "new"
        for tree, when in disk.after_the_end().items():
            found = _judged(judge, rebuild(dict(tree), root), when)
            assert found == "new", f"{when}: {found}"
        for tree, when in disk.crashes.items():
            check(tree, f"power lost {when}", again=True)
        for number, operation in enumerate(disk.operations):
            for lasting in (False, True):
                when = f"operation {number}, {operation}, fails{' and all after it' * lasting}"
                failing = RecordedDisk(rebuild(before, root), fail_at=number, lasting=lasting)
                with failing.recording(), contextlib.suppress(OSError, UserError):
                    write(root)
                check(frozenset(read_tree(root).items()), when, again=True)
                for tree, later in failing.after_the_end().items():
                    check(tree, f"{when}; power lost {later}")
    return disk.operations


def _judged(judge: Callable[[Path], str], root: Path, when: str) -> str:
    try:
        return judge(root)
    except AssertionError as error:
        raise AssertionError(f"{when}: {error}") from error


def _walk(
    node: _Node,
    path: str,
    later: dict[_Node, dict[str, _Node]],
    chosen: Callable[[bytes, bytes], bytes],
    tree: Tree,
) -> None:
    for name, child in later.get(node, node.names).items():
        if child.is_directory:
            tree[f"{path}{name}"] = None
            _walk(child, f"{path}{name}/", later, chosen, tree)
        else:
            is_flushed = child.written == child.flushed
            tree[f"{path}{name}"] = child.flushed if is_flushed else chosen(child.written, child.flushed)


def _assign(names: dict[str, _Node], name: str, target: _Node | None) -> None:
    if target is None:
        names.pop(name, None)
    else:
        names[name] = target


def _name(path: Any) -> str:
    return Path(os.fsdecode(path)).name


def _is_there(path: Any, dir_fd: int | None) -> bool:
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
