"""Writes sources as shards, on several processes and nodes, resumably, and accounts for every item.

A unit of a source becomes one shard, so a shard's bytes depend on neither the number of processes nor on kills.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from base.config import UserError
from base.progress import REPORT_EVERY_S, ProgressLine
from base.terminal import say
from data.processes import forked
from data.shards import (
    MAKE_SHARDS,
    OpenShard,
    Sample,
    ShardProgress,
    check_shards,
    claim_shards,
    finished_shard,
    shard_name,
    write_manifest,
)
from data.shards.index import Cut
from data.sources import deduplicate
from data.sources.base import BadItemError, Source
from data.sources.deduplicate import remove_duplicates
from data.sources.prepare import CUT_AREA, Preparation

WAIT_REPORT_EVERY_S = 30.0
LOCK_WAIT_S = 5.0
DEDUPLICATING = ".deduplicating"  # a file that exists while node 0 removes duplicates
RECIPE = 1  # raise it when equal input would give other bytes


@dataclass(frozen=True)
class Ledger:
    """Accounts for the items of a source: num_read = num_written + num_rejected."""

    num_read: int
    num_written: int
    num_rejected: int
    reasons: tuple[tuple[str, int], ...] = ()  # (kind of rejection, count), most frequent first
    cut: Cut = field(default_factory=Cut)

    def __str__(self) -> str:
        reasons = ", ".join(f"{kind} {count}" for kind, count in self.reasons)
        line = f"read {self.num_read} = written {self.num_written} + rejected {self.num_rejected}"
        return f"{line} ({reasons})" if reasons else line

    @property
    def cut_line(self) -> str:
        """A line about images that lost much of their area to the square crop; "": no image did."""
        if not self.cut.num_cut:
            return ""
        lost = f"{self.cut.num_cut} of {self.cut.num_images} images lost more than {100 * CUT_AREA:.0f} % of their area"
        return f"{lost} to the square crop; --fit pad keeps all of it, on white"


@dataclass(frozen=True)
class Workers:
    """The processes and nodes that divide the units. The shards do not depend on them."""

    num_processes: int = 1
    node: int = 0  # number of this node; all nodes run one command on shared storage
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise UserError(f"{self.num_processes} processes; give at least 1")
        if not 0 <= self.node < self.num_nodes:
            raise UserError(f"node {self.node} of {self.num_nodes}; nodes are numbered from 0")


@dataclass(frozen=True)
class _Task:
    """One unit, and the path of its shard."""

    source: Source
    unit: int
    path: Path
    identity: str  # of source and preparation, in words


def write_sources(
    sources: Mapping[Path, Source],
    workers: Workers | None = None,
    *,
    prepare: Preparation | None = None,
    deduplicate_bits: int | None = None,
    strict: bool = False,
) -> dict[Path, Ledger]:
    """Writes each source into its own folder; `prepare` filters and fits samples.

    Units that an earlier run finished are kept. Bad items go to rejected.jsonl with their reason; with `strict`, the
    first bad item ends the run. `deduplicate_bits`: `max_bits` of remove_duplicates. Node 0 waits for the other nodes,
    writes the manifests and returns the ledgers; other nodes return {}. Prints a progress line. Raises UserError:
    damaged inputs (each is named, after all others are finished), or shards of another source in the folder.
    """
    workers = workers or Workers()
    identities = {
        directory: _identity(source, prepare, deduplicate_bits) for directory, source in sources.items()
    }
    tasks = [
        _Task(source, unit, directory / shard_name(unit), identities[directory])
        for directory, source in sources.items()
        for unit in range(len(source.units))
    ]
    for touch in (check_shards, claim_shards):  # if any folder is refused, none is marked
        for directory in sources:
            touch(directory, MAKE_SHARDS)
    with contextlib.ExitStack() as locks:
        for directory in sources:
            locks.enter_context(_only_writer(directory, workers.node))
        # Once node 0 has begun to remove duplicates, shards change, so node 0 alone writes missing shards.
        is_late = any((directory / DEDUPLICATING).exists() for directory in sources)
        mine = tasks[workers.node :: workers.num_nodes]
        if is_late:
            mine = tasks if workers.node == 0 else []
        todo = [task for task in mine if finished_shard(task.path, source=task.identity) is None]
        problems = _run(todo, len(mine) - len(todo), workers.num_processes, prepare, strict)
        if problems:
            others = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise UserError(
                f"{len(problems)} of {len(mine)} inputs could not be used, the others are done: "
                f"{'; '.join(problems[:3])}{others}. Repair or remove them and run the same command again"
            )
        if workers.node != 0:
            return {}
        _wait_for_nodes(tasks)
        return {
            directory: _finish(
                directory,
                [task.path.name for task in tasks if task.path.parent == directory],
                identity,
                deduplicate_bits,
                workers.num_processes,
            )
            for directory, identity in identities.items()
        }


def _finish(
    directory: Path, names: Sequence[str], identity: str, deduplicate_bits: int | None, num_processes: int
) -> Ledger:
    """Removes duplicates and writes the manifest. Returns the ledger."""
    if deduplicate_bits is not None:
        (directory / DEDUPLICATING).touch()
        remove_duplicates(directory, names, identity, deduplicate_bits, num_processes)
    write_manifest(directory, names, source=identity)
    (directory / DEDUPLICATING).unlink(missing_ok=True)
    shards = [finished_shard(directory / name, source=identity) for name in names]
    return ledger([shard for shard in shards if shard is not None])


@contextlib.contextmanager
def _only_writer(directory: Path, node: int) -> Iterator[None]:
    """Inside, no other command writes as this node. Raises UserError: one does, or the folder cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / f".node-{node}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"{directory}: no folder to write to ({error.strerror}); choose another --out"
        ) from None
    with lock:
        give_up_s = time.monotonic() + LOCK_WAIT_S  # workers of a killed command need a moment to end
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise UserError(
                        f"{directory}: another command writes here as node {node}; wait for it or stop it, or give "
                        "each node its own --node"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield


def _identity(source: Source, prepare: Preparation | None, deduplicate_bits: int | None) -> str:
    """The source and the preparation of a shard in words, which its side file keeps."""
    told = [source.description, f"recipe {RECIPE}"]
    if prepare is not None:
        told.append(prepare.description)
    if deduplicate_bits is not None:
        told.append(deduplicate.description(deduplicate_bits))
    return "; ".join(told)


def _run(
    todo: Sequence[_Task], num_kept: int, num_processes: int, prepare: Preparation | None, strict: bool
) -> list[str]:
    """Writes the units of `todo`; returns a line for each unit that could not be written."""
    if not todo:
        return []
    counts = multiprocessing.get_context("fork").Array(
        "q", 2 * len(todo), lock=False
    )  # items read; then 1 for each finished unit
    progress = ProgressLine(f"{len(todo)} shards to write, {num_kept} kept", "items")

    def work(slot: int) -> str | None:
        try:
            _write_unit(todo[slot], counts, slot, prepare, strict)
        except BadItemError:
            raise
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"{todo[slot].path}: cannot be written ({error.strerror or error}); free some space"
        counts[len(todo) + slot] = 1
        return None

    def tick() -> None:
        progress.show(sum(counts[: len(todo)]), _share(todo, counts))

    return [problem for problem in forked(work, len(todo), num_processes, tick) if problem is not None]


def _share(todo: Sequence[_Task], counts: Sequence[int]) -> float:
    """Share of the work that is done, by items, or by bytes if the length of an input is unknown."""
    units = [task.source.units[task.unit] for task in todo]
    num_items = [unit.num_items for unit in units if unit.num_items is not None]
    if len(num_items) == len(units):
        return sum(counts[: len(todo)]) / max(sum(num_items), 1)
    done = sum(unit.num_bytes for unit, is_done in zip(units, counts[len(todo) :], strict=True) if is_done)
    return done / max(sum(unit.num_bytes for unit in units), 1)


def _wait_for_nodes(tasks: Sequence[_Task]) -> None:
    """Waits until the other nodes have written their units."""
    said_s = 0.0
    while waiting := [task for task in tasks if finished_shard(task.path, source=task.identity) is None]:
        if time.monotonic() - said_s > WAIT_REPORT_EVERY_S:
            said_s = time.monotonic()
            line = f"waiting for {len(waiting)} shards of other nodes, the first is {waiting[0].path}"
            say(line, sys.stderr)
        tasks = waiting
        time.sleep(REPORT_EVERY_S)


def ledger(shards: Sequence[ShardProgress]) -> Ledger:
    """Sums up the shards' side files, and counts rejections by kind."""
    kinds = collections.Counter(reason.partition(":")[0] for shard in shards for _, reason in shard.rejected)
    num_rejected = sum(len(shard.rejected) for shard in shards)
    num_written = sum(shard.entry.num_samples for shard in shards if shard.entry is not None)
    return Ledger(
        sum(shard.num_read for shard in shards),
        num_written,
        num_rejected,
        tuple(kinds.most_common()),
        sum((shard.cut for shard in shards if shard.cut is not None), Cut()),
    )


def _write_unit(
    task: _Task, counts: MutableSequence[int], slot: int, prepare: Preparation | None, strict: bool
) -> None:
    rejected: list[tuple[str, str]] = []
    cut = Cut()
    shard = OpenShard(task.path)
    try:
        for item in task.source.items(task.unit):
            counts[slot] += 1
            try:
                if isinstance(item, BadItemError):
                    raise item
                sample, lost = (item, Cut()) if prepare is None else prepare.prepare(item)
                _add(shard, sample, task)
                cut += lost
            except BadItemError as error:
                if strict:
                    raise
                rejected.append((error.key, error.reason))
    except BaseException:
        shard.drop()
        raise
    shard.close(task.identity, tuple(rejected), counts[slot], cut if cut.num_images else None)


def _add(shard: OpenShard, sample: Sample, task: _Task) -> None:
    try:
        shard.add(sample)
    except UserError as error:  # a repeated key: names the input
        raise UserError(f"{task.source.units[task.unit].name}: {error}") from None
