"""Reads a whole data set again and names everything that differs from what was written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from base import files, limits
from base.config import UserError
from data.processes import over_shards
from data.shards.index import (
    KEY_PATTERN,
    MANIFEST_NAME,
    REJECTED_NAME,
    TAR_BLOCK_BYTES,
    Manifest,
    Records,
    Sample,
    ShardEntry,
    extents,
    key_hash,
)
from data.shards.reader import NAME_BYTES, REPAIR, ShardDataset, open_shard

CHUNK_BYTES = 8 << 20  # size of one read


@dataclass(frozen=True)
class Problem:
    """One fault of a data set."""

    kind: str  # "lost shard", "damaged sample", "bad json", ...
    text: str  # one line that starts with the name of the file
    shard: str = ""  # file name; "" if the fault is the data set's
    key: str = ""  # of the sample; "" if several samples are concerned, or its name is unreadable
    position: int | None = None  # of the sample in the shard
    lost: bool = False  # training must leave out the sample, or without a key the whole shard


class Inspector(Protocol):
    """Examines the samples of one shard."""

    def start(self, records: Records) -> None:
        """Called once, before the samples, if the index is sound."""

    def look(self, position: int, sample: Sample, tree: dict[str, Any]) -> Iterable[str]:
        """Yields the faults ("kind: detail") of a sample whose bytes are sound; `tree`: its json, {} without one."""


def verify(directory: str | Path, num_processes: int = 1) -> list[str]:
    """Reads a data set again and returns one line for every problem, which names its file; []: it is sound."""
    directory = Path(directory)
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]
    problems = list(check_rejected(directory, manifest))
    work = functools.partial(check_shard, directory, manifest)
    num_samples = [entry.num_samples for entry in manifest.shards]
    for found in over_shards(work, num_samples, num_processes, "verify"):
        problems += found
    return [f"{directory / problem.text}" for problem in problems]


def leftovers(directory: Path, manifest: Manifest) -> list[str]:
    """Lines about a killed writer's files and tars not in the manifest, which harm no reader of the manifest."""
    listed = {entry.name for entry in manifest.shards}
    notes = [
        f"{path.name}: temporary file of a writer that was killed or is still running; delete it in the first case"
        for path in sorted(directory.glob(".*.tmp"))
    ]
    return notes + [
        f"{path.name}: not in {MANIFEST_NAME}; readers that take every tar of the folder would read it"
        for path in sorted(directory.glob("*.tar"))
        if path.name not in listed
    ]


def check_rejected(directory: Path, manifest: Manifest) -> Iterator[Problem]:
    """Compares the number of lines in rejected.jsonl with the manifest's."""
    path = directory / REJECTED_NAME
    num_lines = 0
    if path.is_file():
        with limits.open_file(path) as file:
            num_lines = sum(1 for _ in limits.lines(file, path))
    if num_lines != manifest.num_rejected:
        text = f"{REJECTED_NAME}: has {num_lines} lines, {MANIFEST_NAME} says {manifest.num_rejected}"
        yield Problem("rejected", text)


def check_shard(
    directory: Path, manifest: Manifest, shard: int, inspector: Inspector | None = None
) -> list[Problem]:
    """Reads one shard as training would and compares it with the manifest; `inspector` examines its samples."""
    entry = manifest.shards[shard]
    try:
        records = open_shard(directory, entry)
        sha256 = files.sha256(directory / entry.name)
    except (UserError, OSError) as error:
        text = str(error).removeprefix(f"{directory}/")
        return [Problem("lost shard", _named(entry, text), entry.name, lost=True)]
    is_sound = sha256 == entry.sha256
    swapped = [other.name for other in manifest.shards if other.sha256 == sha256]
    if not is_sound and swapped:
        text = f"{entry.name}: holds the bytes of {swapped[0]}; give the files their names back"
        return [Problem("lost shard", text, entry.name, lost=True)]
    if inspector is not None:
        inspector.start(records)
    problems: list[Problem] = []
    for position, found in _read_all(directory, manifest, entry, records):
        reasons = [found] if isinstance(found, Problem) else list(_look(entry, position, found, inspector))
        problems += reasons
    if not is_sound and not any(problem.kind == "damaged sample" for problem in problems):
        problems += _harmless(directory / entry.name, records)
    return problems


def read_sample(directory: Path, manifest: Manifest, shard: int, position: int) -> Sample:
    """Reads one sample; the other shards may be damaged. Raises UserError: as ShardDataset."""
    entry = manifest.shards[shard]
    return _alone(directory, manifest, entry, open_shard(directory, entry)).read([position])[0]


def _alone(directory: Path, manifest: Manifest, entry: ShardEntry, records: Records) -> ShardDataset:
    manifest = dataclasses.replace(manifest, shards=(entry,), num_samples=entry.num_samples)
    return ShardDataset(directory, manifest, [records])


def printable(text: str) -> str:
    """`text` as one line without control characters, which captions or damaged headers may hold."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _named(entry: ShardEntry, text: str) -> str:
    return text if text.startswith((entry.name, entry.index_name)) else f"{entry.name}: {text}"


def _read_all(
    directory: Path, manifest: Manifest, entry: ShardEntry, records: Records
) -> Iterator[tuple[int, Sample | Problem]]:
    """Yields (position, sample or its problem) for every sample of a shard."""
    dataset = _alone(directory, manifest, entry, records)
    ends = np.cumsum(extents(records)) // CHUNK_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(records)]
    for a, b in itertools.pairwise(cuts):
        try:
            samples = dataset.read(range(a, b))
        except UserError:
            for position in range(a, b):
                try:
                    yield position, dataset.read([position])[0]
                except UserError:
                    yield position, _damage(directory / entry.name, position, records)
        else:
            yield from enumerate(samples, a)


def _look(entry: ShardEntry, position: int, sample: Sample, inspector: Inspector | None) -> Iterator[Problem]:
    where = f"{entry.name}: sample '{sample.key}'"
    trees: dict[str, Any] = {}
    for part, payload in sample.parts.items():
        if part.split(".")[-1] != "json":
            continue
        try:
            trees[part] = json.loads(payload)
        except (ValueError, RecursionError):
            text = f"{where}: part '{part}' is not JSON"
            yield Problem("bad json", text, entry.name, sample.key, position, lost=True)
    tree = trees.get("json", {})
    if not isinstance(tree, dict):
        text = f"{where}: part 'json' is no object"
        yield Problem("bad json", text, entry.name, sample.key, position, lost=True)
    elif inspector is not None and ("json" in trees or "json" not in sample.parts):
        for reason in inspector.look(position, sample, tree):
            kind = reason.partition(":")[0]
            yield Problem(kind, printable(f"{where}: {reason}"), entry.name, sample.key, position, lost=True)


def _damage(path: Path, position: int, records: Records) -> Problem:
    """The problem of a sample whose checksum is wrong, with its key if one of its headers is readable."""
    record = records[position]
    members = list(_members(path, record))
    faults = [member.fault or f"payload of '{member.name}' is zeroed" for member in members if member.is_bad]
    keys = [member.name.partition(".")[0] for member in members]
    key = next((key for key in keys if key_hash(key) == record["key_hash"]), "")
    other = next((key for key in keys if KEY_PATTERN.fullmatch(key)), "")
    in_its_place = f"sample '{other}' stands in its place" if other and not key else ""
    fault = in_its_place or ", ".join(faults) or "its bytes changed"
    who = f"sample '{key}'" if key else f"sample {position} (its name is lost)"
    text = f"{path.name}: {who} at byte {record['offset']} is damaged (CRC-32): {fault}; {REPAIR}"
    return Problem("damaged sample", printable(text), path.name, key, position, lost=True)


@dataclass(frozen=True)
class _Member:
    """A part of a sample, from its tar header."""

    name: str
    fault: str  # fault of the header; "" if it is sound
    is_zeroed: bool  # whether the payload is all zeros

    @property
    def is_bad(self) -> bool:
        return bool(self.fault) or self.is_zeroed


def _members(path: Path, record: Any) -> Iterator[_Member]:
    """The parts of a sample that a stock tar reader would find at the index's positions."""
    begin = int(record["offset"])
    sizes = zip(record["part_bytes"].tolist(), record["header_blocks"].tolist(), strict=True)
    with limits.open_file(path) as file:
        for number, (num_bytes, num_headers) in enumerate(sizes):
            if num_bytes == 0:
                return
            begin += num_headers * TAR_BLOCK_BYTES
            file.seek(begin - TAR_BLOCK_BYTES)
            header, payload = file.read(TAR_BLOCK_BYTES), file.read(num_bytes)
            begin += -(-num_bytes // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
            try:
                member = tarfile.TarInfo.frombuf(header, "ascii", "replace")
                name, fault = member.name, ""
                if member.size != num_bytes:
                    fault = f"{member.size} bytes, not {num_bytes}"
            except tarfile.HeaderError as error:
                name = header[:NAME_BYTES].split(b"\0", 1)[0].decode("ascii", "replace")
                fault = str(error) if any(header) else "zeroed"
            fault = fault and f"tar header of part {number} is bad ({fault})"
            yield _Member(name, fault, not any(payload))


def _harmless(path: Path, records: Records) -> list[Problem]:
    """Damage outside the bytes that our reader checks. Stock readers silently lose everything after a bad header."""
    problems = [
        Problem(
            "bad header",
            printable(
                f"{path.name}: sample '{member.name.partition('.')[0]}' at byte {record['offset']}: {member.fault}; "
                f"training is not harmed, but stock readers end there; {REPAIR}"
            ),
            path.name,
            member.name.partition(".")[0],
            position,
        )
        for position, record in enumerate(records)
        for member in _members(path, record)
        if member.fault
    ]
    text = f"{path.name}: SHA-256 differs from {MANIFEST_NAME}, all samples are sound; {REPAIR}"
    return problems or [Problem("changed shard", text, path.name)]
