"""Every write of base.files leaves the old or the new, whole, whatever fails and whenever the power goes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from base import files
from base.files import MADE_BY, PAGE_SIGN, write_bytes
from helpers.recorded_disk import CONTENTS, RecordedDisk, check_order_of_writing

OLD, NEW = "old " * 3000, "new" * 3000  # more than Python's buffer of 8 KiB: several writes
WRITERS = {
    "write_bytes": lambda path, text: files.write_bytes(path, text.encode()),
    "write_text": files.write_text,
    "write_json": files.write_json,
    "write_page": files.write_page,
}


def read_file(path: Path) -> str:
    """The word of a whole file: "old" (which includes: there was none), or "new"."""
    if not path.exists():
        return "absent"
    text = path.read_text().removesuffix(f"{PAGE_SIGN}\n").strip('"\n')
    assert text in (OLD, NEW), f"{path.name} holds {len(text)} characters, {text[:8]!r}"
    return "old" if text == OLD else "new"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_is_the_old_or_the_new_after_any_failure_and_power_loss(writer, is_there, tmp_path) -> None:
    def prepare(root: Path) -> None:
        if is_there:
            WRITERS[writer](root / "run/out/file", OLD)

    operations = check_order_of_writing(
        tmp_path,
        prepare,
        lambda root: WRITERS[writer](root / "run/out/file", NEW),
        lambda root: read_file(root / "run/out/file"),
        allowed=("old", "new") if is_there else ("absent", "new"),
    )
    assert {"fsync file", "fsync directory"} <= set(operations)


def write_folder(path: Path, text: str) -> None:
    with files.directory(path, is_own=lambda folder: (folder / "a").is_file()) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "below").mkdir()
        (temporary / "below/b").write_text(text)


def read_folder(path: Path) -> str:
    if not path.is_dir() or not any(path.iterdir()):
        return "absent"
    found = {str(file.relative_to(path)): read_file(file) for file in path.rglob("*") if file.is_file()}
    assert sorted(found) == ["a", "below/b"] and len(set(found.values())) == 1, f"{path.name} holds {found}"
    return found["a"]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an old folder"])
def test_a_folder_is_the_old_or_the_new_or_absent(before, tmp_path) -> None:
    """No call of POSIX exchanges two folders: between the old one and the new one there may be none."""

    def prepare(root: Path) -> None:
        if before == "an empty folder":
            (root / "run/out").mkdir(parents=True)
        elif before == "an old folder":
            write_folder(root / "run/out", OLD)

    def judge(root: Path) -> str:
        if before == "an empty folder":
            assert (root / "run/out").is_dir(), "the folder is gone"
        return read_folder(root / "run/out")

    check_order_of_writing(
        tmp_path,
        prepare,
        lambda root: write_folder(root / "run/out", NEW),
        judge,
        allowed=("old", "absent", "new") if before == "an old folder" else ("absent", "new"),
    )


def test_an_old_folder_goes_back_if_its_successor_cannot_take_its_place(tmp_path) -> None:
    write_folder(tmp_path / "out", OLD)
    disk = RecordedDisk(tmp_path)
    with disk.recording():
        write_folder(tmp_path / "out", OLD)
    (last,) = [n for n, operation in enumerate(disk.operations) if operation == "rename out to out"]
    with RecordedDisk(tmp_path, fail_at=last).recording(), pytest.raises(OSError, match="Input/output"):
        write_folder(tmp_path / "out", NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and read_folder(tmp_path / "out") == "old"


def test_a_replaced_folder_leaves_nothing_beside_it(tmp_path) -> None:
    for text in (OLD, NEW):
        write_folder(tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and read_folder(tmp_path / "out") == "new"


def test_a_claimed_folder_is_its_owners_after_any_crash(tmp_path) -> None:
    """A crash between the marker and the first file must not turn the command's own files into a stranger's."""

    def write(root: Path) -> None:
        files.claim(root / "out", "sample", ["*.txt"])
        files.write_text(root / "out/a.txt", NEW)

    def judge(root: Path) -> str:
        files.check_claim(root / "out", "sample", ["*.txt"])
        return read_file(root / "out/a.txt")

    check_order_of_writing(tmp_path, lambda root: None, write, judge, allowed=("absent", "new"))
    assert (tmp_path / f"disk/out/{MADE_BY}sample").is_file()


def found_after(action: Callable[[Path], None], tmp_path: Path) -> set[bytes | None]:
    """What a power loss may leave at the name `file`, which held b"old", after `action`; None: nothing."""
    (tmp_path / "file").write_bytes(b"old")
    disk = RecordedDisk(tmp_path)
    with disk.recording():
        action(tmp_path)
    return {dict(tree).get("file") for tree in disk.after_the_end()}


def in_place(folder: Path) -> None:
    (folder / "file").write_bytes(b"newer")


def renamed(folder: Path) -> None:
    (folder / "part").write_bytes(b"newer")
    (folder / "part").replace(folder / "file")


def flushed(folder: Path) -> None:
    with (folder / "part").open("wb") as file:
        file.write(b"newer")
        file.flush()
        os.fsync(file.fileno())
    (folder / "part").replace(folder / "file")


def flushed_unwritten(folder: Path) -> None:
    with (folder / "part").open("wb") as file:
        file.write(b"newer")  # still in Python's buffer
        os.fsync(file.fileno())
    (folder / "part").replace(folder / "file")


ZEROS = bytes(5)


@pytest.mark.parametrize(
    ("action", "left"),
    [
        (in_place, {b"newer", b"old", b"ne", ZEROS}),
        (renamed, {b"old", b"newer", b"", b"ne", ZEROS}),
        (flushed, {b"old", b"newer"}),
        (flushed_unwritten, {b"old", b"newer", b"", b"ne", ZEROS}),
        (lambda folder: write_bytes(folder / "file", b"newer"), {b"newer"}),
        (lambda folder: (folder / "file").unlink(), {b"old", None}),
    ],
)
def test_the_recorded_disk_keeps_what_was_flushed_and_nothing_else(action, left, tmp_path) -> None:
    assert len(CONTENTS) == 4
    assert found_after(action, tmp_path) == left
