"""The folder of a training's checkpoints: its names, and state.json, which holds checksums of the files beside it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic cannot check typing.TypedDict before Python 3.12

from base import files
from base.config import UserError

CHECKPOINTS = "checkpoints"
"""The folder of all checkpoints in a run's folder."""
EXPORT = "export"
"""The folder of the finished training's weights, beside it."""
FORMAT = 2
"""Version of the layout. Format 1 was DeepSpeed's own files, which only an equal number of ranks could read."""
STATE = "state.json"


@dataclass(frozen=True)
class Sum:
    """Size in bytes and CRC-32 of an undamaged file."""

    num_bytes: int
    crc32: int


class _File(TypedDict):
    bytes: int
    crc32: int


class _Engine(TypedDict):
    shapes: dict[str, list[int]]


class _State(TypedDict):
    format: int
    step: int
    num_ranks: Annotated[int, Field(ge=1, le=1 << 20)]  # each has a name to be made
    ema_decays: list[float]
    fingerprints: dict[str, str]
    engines: dict[str, _Engine]
    files: dict[str, _File]


_STATE = TypeAdapter(_State)
"""The entries of state.json that a reader relies on; other entries are not checked."""


def file_name(rank: int) -> str:
    """Name of the file that one rank writes."""
    return f"rank_{rank:05d}.safetensors"


def all_in(root: Path) -> list[Path]:
    """Checkpoints, good or damaged, oldest first, as this rank's file system shows them."""
    return sorted(root.glob("step_*"))


def step_of(directory: Path) -> int:
    """`step_00001000 -> 1000`."""
    return int(directory.name.removeprefix("step_"))


def hide(directories: Sequence[Path]) -> list[Path]:
    """Renames checkpoints before their removal, so that a kill or a power loss leaves nothing that looks complete."""
    hidden = []
    for directory in directories:
        hidden.append(directory.with_name(f".{directory.name}.old"))
        shutil.rmtree(hidden[-1], ignore_errors=True)
        directory.rename(hidden[-1])
    if directories:
        files.fsync_directory(directories[0].parent)
    return hidden


def clean(root: Path) -> None:
    """Removes the checkpoints that a killed process left half written or half removed."""
    for pattern in (".step_*.tmp", ".step_*.old"):
        for hidden in root.glob(pattern):
            shutil.rmtree(hidden)
    for hidden in root.glob(".latest.*.tmp"):
        hidden.unlink()


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes state.json with a digest of itself. Raises OSError."""
    content = {name: value for name, value in state.items() if name != "digest"}
    files.write_json(directory / STATE, {**content, "digest": files.digest(content)})


def read_state(directory: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's state, and what is wrong with it ('': nothing). Another format's digest is not checked."""
    try:
        state: dict[str, Any] = files.read_json(directory / STATE)
        content = {name: value for name, value in state.items() if name != "digest"}
        has_digest = state.get("digest") == files.digest(content)
    except (OSError, UserError, AttributeError) as error:
        return {}, f"{STATE} cannot be read ({type(error).__name__})"
    if state.get("format") not in (None, FORMAT) and (has_digest or "digest" not in state):
        return state, ""
    if not has_digest:
        return {}, f"{STATE} has a wrong checksum"
    try:
        return files.checked(_STATE, state, STATE), ""
    except UserError as error:
        return {}, str(error)


def sums(state: Mapping[str, Any]) -> dict[str, Sum]:
    """Expected size and checksum of each file beside a state, by name."""
    return {name: Sum(entry["bytes"], entry["crc32"]) for name, entry in state["files"].items()}
