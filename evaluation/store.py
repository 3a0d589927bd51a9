"""The store of expensive answers: append-only records keyed by item, pass and everything that decides the answer.

DIR/records-RANK.jsonl has one line an answer: {"item", "pass", "config", "value"}, or "refused" with the reason in
place of the value; the next run asks a refused question again. Only a complete line counts: the torn last line of a
killed run is cut off when its file is next written. Every rank appends to its own file and reads all files, so a run
can continue on another number of ranks. Answers under another config (other weights, another prompt, another image)
stay in the files and are not found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from base import files, limits
from base.config import UserError
from base.progress import ProgressLine
from base.terminal import say

MAX_NAMED = 3
Key = tuple[str, int, str]
T = TypeVar("T")


class RefusedError(UserError):
    """A judge will not answer this question (a content filter); it may answer others."""


@dataclass(frozen=True)
class Refusal:
    """The place of an answer that was refused, with the reason."""

    reason: str


@dataclass(frozen=True)
class Question:
    """A question to a judge, asked once."""

    item: str
    """Key of the item; with several questions about an item, the key and the question's name: `KEY/sc`."""
    number: int
    """Number of the pass, from 0."""
    config: str
    """Hash of all that decides the answer."""
    ask: Callable[[], Any]
    """Returns the answer as JSON values; it may take minutes."""

    @property
    def key(self) -> Key:
        """Key under which the answer is stored."""
        return self.item, self.number, self.config


class RecordStore:
    """Answers of earlier runs, and a file for this run's answers."""

    def __init__(self, directory: Path, rank: int = 0) -> None:
        """Raises UserError: a line that is no record, one question with two answers."""
        self._directory = directory
        self._path = directory / f"records-{rank:05d}.jsonl"
        self._answers: dict[Key, Any] = {}
        self._refusals: dict[Key, Refusal] = {}
        for path in sorted(directory.glob("records-*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, item: str, number: int, config: str) -> Any:
        """The answer, or a Refusal. Raises UserError: the question was not asked yet."""
        key = (item, number, config)
        try:
            return self._answers[key] if key in self._answers else self._refusals[key]
        except KeyError:
            raise UserError(
                f"{self._directory}: has no answer for '{item}', pass {number}; run the same command again to go on"
            ) from None

    def answer(self, questions: Sequence[Question], what: str) -> None:
        """Asks the questions without an answer, in order; each answer is on disk before the next question."""
        todo = [question for question in questions if question.key not in self._answers]
        if not todo:
            return
        progress = ProgressLine(what, "answers")
        refused: list[str] = []
        self._directory.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self._path)
        with self._path.open("ab") as file:
            for count, question in enumerate(todo, start=1):
                record = {"item": question.item, "pass": question.number, "config": question.config}
                try:
                    record["value"] = self._answers[question.key] = question.ask()
                except RefusedError as error:
                    record["refused"] = str(error)
                    self._refusals[question.key] = Refusal(str(error))
                    refused.append(f"'{question.item}' ({error})")
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                progress.show(count, count / len(todo))
        if refused:
            first = ", ".join(refused[:MAX_NAMED])
            say(f"{what}: {len(refused)} of {len(todo)} questions were refused: {first}")

    def _read(self, path: Path) -> None:
        *lines, _torn = limits.read_bytes(path, limits.DOCUMENT_BYTES).split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record: Mapping[str, Any] = json.loads(line)
                key = (str(record["item"]), int(record["pass"]), str(record["config"]))
                if "refused" in record:
                    self._refusals[key] = Refusal(str(record["refused"]))
                    continue
                value = record["value"]
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise UserError(f"{path}:{number}: is no record; take the line out and run again") from None
            if self._answers.setdefault(key, value) != value:
                raise UserError(
                    f"{path}:{number}: another answer to '{key[0]}', pass {key[1]}; keep one of them"
                )


def share(values: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """This rank's part of `values`, fixed by index, so that no two ranks share a value."""
    return values[rank::world]


def config_hash(*parts: Any) -> str:
    """Hash of JSON values; 16 digits tell the configs of one store apart."""
    return files.digest(list(parts))[:16]


def _cut_torn_line(path: Path) -> None:
    if path.is_file():
        payload = path.read_bytes()
        whole = payload.rfind(b"\n") + 1
        if whole != len(payload):
            with path.open("r+b") as file:
                file.truncate(whole)
