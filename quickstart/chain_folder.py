"""The folder of a chain of steps: which files the chain made, and --fresh, which removes these files alone.

Before a step runs, the paths in the folder are written down. Paths that are new afterwards are the step's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from base import files
from base.config import UserError

LISTS = ".files"
"""Folder of the lists, one for each step: {"own": paths}, and while the step runs "before": paths that were there."""
OWN = (
    *("notes.json", "durations.json", "report.html", "report.json", f"{files.MADE_BY}*"),
    *("steps/*.json", "logs/*.log", f"{LISTS}/*.json"),
)
"""Patterns of the files that the chain writes between its steps."""
FOLDERS = ("steps", "logs", LISTS, "data", "latents", "text_tokenizer", "evaluation")


def claim(root: Path, command: str) -> None:
    """Lets the chain `command` write to `root`, as base.files.claim does. Raises UserError."""
    files.claim(root, command, (*OWN, *FOLDERS), lambda folder: bool(_steps(folder)))


def check(root: Path, command: str) -> None:
    """Raises UserError if `claim` would. Writes nothing."""
    files.check_claim(root, command, (*OWN, *FOLDERS), lambda folder: bool(_steps(folder)))


@contextmanager
def recorded(root: Path, step: str) -> Iterator[None]:
    """Context of a step: paths new in `root` at its end are the step's own, also after a kill and another run."""
    path = root / LISTS / f"{step}.json"
    state = _read(path)
    if "before" not in state:
        state["before"] = sorted(_below(root))
        files.write_json(path, state)
    try:
        yield
    finally:
        files.write_json(path, {"own": sorted(_own(root, state))})


def remove(root: Path, command: str, steps: Collection[str]) -> None:
    """Empties `root` for --fresh. `steps`: names of the chain's steps.

    Raises UserError, and removes nothing, where check_removable raises it.
    """
    check_removable(root, command, steps)
    for entry in root.iterdir() if root.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def check_removable(root: Path, command: str, steps: Collection[str] | None = None) -> None:
    """Checks that `remove` may empty `root`; `steps` None: the chain's steps are not known yet.

    Raises UserError: a folder of another chain or of none, a file that no step wrote, a training that runs there.
    """
    if not root.is_dir() or not any(root.iterdir()):
        return
    steps = _steps(root) if steps is None else steps
    if not (root / f"{files.MADE_BY}{command}").is_file() and not (_steps(root) and _steps(root) <= {*steps}):
        raise UserError(
            f"{root}: --fresh removes what {command} made, and this is something else; remove it yourself"
        )
    if strange := _strange(root, steps):
        raise UserError(
            f"{root}: holds {strange[0]}, and nothing shows that {command} wrote it; move it away, then --fresh again"
        )
    from engine import run_lock

    for lock in sorted(root.rglob(run_lock.NAME)):
        if reason := run_lock.refusal(lock.parent):
            raise UserError(reason)


def _strange(root: Path, steps: Collection[str]) -> list[str]:
    """Paths below `root` that the chain did not make; entries of `root` if an earlier version kept no lists."""
    if not (root / LISTS).is_dir():
        names = {*FOLDERS, *steps, *OWN}
        return sorted(entry.name for entry in root.iterdir() if entry.name not in names)
    own = {path for file in (root / LISTS).glob("*.json") for path in _own(root, _read(file))}
    there = _below(root) - own
    return sorted(path for path in there if not any(fnmatchcase(path, pattern) for pattern in OWN))


def _own(root: Path, state: dict[str, Any]) -> set[str]:
    new = _below(root) - set(state["before"]) if "before" in state else set()
    return new | set(state.get("own", []))


def _below(root: Path) -> set[str]:
    """Paths of files and links below `root`, relative to it; links are not followed."""
    found = set()
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        found |= {(Path(folder) / name).relative_to(root).as_posix() for name in (*names, *links)}
    return found


def _read(path: Path) -> dict[str, Any]:
    return dict(files.read_json(path)) if path.is_file() else {}


def _steps(root: Path) -> set[str]:
    """Names of the steps that a chain has noted in `root`; empty if there is anything else among the notes."""
    found = set()
    for path in (root / "steps").glob("*"):
        try:
            files.read_json(path)["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return set()
        found.add(path.stem)
    return found
