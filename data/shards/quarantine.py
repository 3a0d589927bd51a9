"""The quarantine file: samples and shards that training leaves out, each with the reason.

It is jsonl, one object a line, with exactly two fields:
{"key": "image-000000017", "reason": "unreadable image: ..."}     one sample
{"shard": "shard-000003.tar", "reason": "lost shard: ..."}        a whole shard
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base import files, limits
from base.config import UserError
from data.shards.index import KEY_PATTERN

SHARD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")


@dataclass(frozen=True)
class Quarantine:
    """The samples (by key) and shards that training leaves out of one data set."""

    keys: frozenset[str] = frozenset()
    shards: frozenset[str] = frozenset()  # the shards' names in the manifest


def read_quarantine(path: str | Path) -> Quarantine:
    """Reads a quarantine file. Raises UserError: no such file, or a line in another form, which the message names."""
    keys, shards = _read(Path(path))
    return Quarantine(frozenset(keys), frozenset(shards))


def add_to_quarantine(path: str | Path, keys: Mapping[str, str], shards: Mapping[str, str]) -> Quarantine:
    """Adds samples and shards, each with its reason, to the file, which need not exist; earlier reasons stay.

    The file is replaced as a whole. Returns its new content. Raises UserError: as `read_quarantine`.
    """
    path = Path(path)
    old_keys, old_shards = _read(path) if path.exists() else ({}, {})
    keys, shards = {**keys, **old_keys}, {**shards, **old_shards}
    lines = [{"shard": shard, "reason": shards[shard]} for shard in sorted(shards)]
    lines += [{"key": key, "reason": keys[key]} for key in sorted(keys)]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return Quarantine(frozenset(keys), frozenset(shards))


def _read(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The file's reasons, by key and by shard."""
    try:
        lines = limits.read_text(path, limits.TEXT_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable quarantine file ({error})") from None
    keys: dict[str, str] = {}
    shards: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            kind, name, reason = _parse(line, f"{path}: line {number}")
            (keys if kind == "key" else shards)[name] = reason
    return keys, shards


def _parse(line: str, where: str) -> tuple[str, str, str]:
    """One line's ("key" or "shard", name, reason). Raises UserError naming `where`."""
    try:
        tree = json.loads(line)
        (kind,) = set(tree) - {"reason"}
        name, reason = tree[kind], tree["reason"]
        pattern = {"key": KEY_PATTERN, "shard": SHARD_PATTERN}[kind]
        if not isinstance(reason, str) or not pattern.fullmatch(name):
            raise ValueError(name)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f'{where}: expected {{"key": ..., "reason": ...}} or {{"shard": ..., "reason": ...}}; correct this line'
        ) from None
    return kind, name, reason
