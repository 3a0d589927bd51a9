"""GEdit-Bench-EN and ImgEdit-Bench: a vision-language judge rates edits.

Items have the roles `source` and `result`, and in their meta the instruction and the benchmark's group. Every score
carries the judge's name. Answers that cannot be read are counted in `unparseable`, items that the judge refused
in `refused`; neither gives a score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.config import UserError
from data.image_set import ImageSet, Item
from evaluation.judge_instructions import (
    EDIT_PROMPT,
    INSTRUCTION,
    SCALE,
    ImgEditInstructions,
    VieInstructions,
)
from evaluation.judges.interface import Asked, VisionLanguageJudge, question
from evaluation.metrics.interval import mean_of_means
from evaluation.metrics.vie import read_scores, read_three_ratings, sample_scores
from evaluation.runner import Measurement, SetScore, Value
from evaluation.store import Question, RecordStore, Refusal, share

FIRST_SEED = 42  # pass i is asked with FIRST_SEED + i, as EditScore does
GEDIT_GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
GEDIT_ROWS = 606
IMGEDIT_ROWS = 737


class GEditSuite:
    """Implements Suite, SetSuite and CollectingSuite of evaluation.runner; groups: meta.task_type."""

    name = "gedit"
    roles = ("source", "result")

    def __init__(
        self, instructions: VieInstructions, judge: VisionLanguageJudge, store: Path, *, num_passes: int = 1
    ) -> None:
        """Every item is judged `num_passes` times, with consecutive seeds."""
        if num_passes < 1:
            raise UserError(f"{num_passes} passes; give at least 1")
        self._instructions, self._judge, self._store, self._num_passes = (
            instructions,
            judge,
            store,
            num_passes,
        )
        self.protocol: Mapping[str, Any] = {
            "scale": f"{SCALE}, divided by {SCALE / 10}",
            "passes": num_passes,
            "seeds": f"{FIRST_SEED} and on",
            "overall": "sqrt(SC PQ) of each pass, mean over passes, then samples, then groups, unweighted",
            **judge.protocol,
        }
        self.fingerprints: Mapping[str, str] = {
            "judge": judge.fingerprint,
            "instructions": instructions.sha256,
        }

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Asks the judge about this rank's edits."""
        questions = [
            one
            for item in share(items, rank, world)
            for number in range(self._num_passes)
            for one in self._questions(images, item, number)
        ]
        RecordStore(self._store, rank).answer(questions, f"rank {rank}: GEdit-Bench")

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """sc, pq and o, means over the passes that could be read; nan without such passes."""
        store = RecordStore(self._store)
        found = []
        for item in items:
            read, answers = [], []
            refusals: list[str] = []
            for number in range(self._num_passes):
                texts = [store.find(*one.key) for one in self._questions(images, item, number)]
                refusals += [text.reason for text in texts if isinstance(text, Refusal)]
                if any(isinstance(text, Refusal) for text in texts):
                    continue
                edit, picture = (read_scores(str(text), SCALE) for text in texts)
                answers.append(texts)
                read.append(None if edit is None or picture is None else sample_scores(edit, picture, SCALE))
            scores = [one for one in read if one is not None]
            means = [math.fsum(column) / len(scores) for column in zip(*scores, strict=True)] or [
                math.nan
            ] * 3
            values: dict[str, Value] = dict(zip(("sc", "pq", "o"), means, strict=True))
            unparseable = tuple(one is None for one in read)
            detail = {"answers": answers[0] if answers else [], **_told(refusals)}
            values |= {"unparseable": unparseable, "refused": bool(refusals)}
            found.append(Measurement(values, (item.field("task_type"),), detail))
        return found

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """G_SC, G_PQ and G_O."""
        measured = self.measure(images, items)
        note = _completeness(measured, len(items), GEDIT_ROWS, len(GEDIT_GROUPS), "GEdit-Bench-EN")
        return {
            f"g_{metric}_{self._judge.name}": SetScore.of(mean_of_means(_by_group(measured, metric)), note)
            for metric in ("sc", "pq", "o")
        }

    def _questions(self, images: ImageSet, item: Item, number: int) -> list[Question]:
        if item.meta.get("instruction_language", "en") != "en":
            raise UserError(
                f"item '{item.key}': its instruction is not English; GEdit-Bench-EN leaves it out"
            )
        edit = self._instructions.edit.replace(INSTRUCTION, item.field("instruction"))
        seed = FIRST_SEED + number
        asked = (
            Asked("sc", ("source", "result"), edit, seed, number, like="source"),
            Asked("pq", ("result",), self._instructions.picture, seed, number, like="source"),
        )
        return [question(self._judge, images, item, one) for one in asked]


class ImgEditSuite:
    """Implements Suite, SetSuite and CollectingSuite of evaluation.runner; groups: meta.edit_type.

    An item's score is the mean of three ratings from 1 to 5; the benchmark's is the unweighted mean over kinds of
    edits.
    """

    name = "imgedit"
    roles = ("source", "result")

    def __init__(self, instructions: ImgEditInstructions, judge: VisionLanguageJudge, store: Path) -> None:
        self._instructions, self._judge, self._store = instructions, judge, store
        self.protocol: Mapping[str, Any] = {
            "score": "mean of three ratings from 1 to 5, mean over items of a kind, then over kinds, unweighted",
            "seed": FIRST_SEED,
            **judge.protocol,
        }
        self.fingerprints: Mapping[str, str] = {
            "judge": judge.fingerprint,
            "instructions": instructions.sha256,
        }

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Asks the judge about this rank's edits."""
        questions = [self._question(images, item) for item in share(items, rank, world)]
        RecordStore(self._store, rank).answer(questions, f"rank {rank}: ImgEdit-Bench")

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """`rating` of every edit; nan if the answer cannot be read."""
        store = RecordStore(self._store)
        found = []
        for item in items:
            said = store.find(*self._question(images, item).key)
            refusals = [said.reason] if isinstance(said, Refusal) else []
            answers = [] if refusals else [str(said)]
            ratings = read_three_ratings(answers[0]) if answers else None
            rating = math.nan if ratings is None else sum(ratings) / len(ratings)
            values: dict[str, Value] = {
                "rating": rating,
                "unparseable": () if refusals else ratings is None,
                "refused": bool(refusals),
            }
            detail = {"answers": answers, **_told(refusals)}
            found.append(Measurement(values, (item.field("edit_type"),), detail))
        return found

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The mean over kinds of edits."""
        measured = self.measure(images, items)
        note = _completeness(
            measured, len(items), IMGEDIT_ROWS, len(self._instructions.texts), "ImgEdit-Bench"
        )
        overall = mean_of_means(_by_group(measured, "rating"))
        return {f"imgedit_{self._judge.name}": SetScore.of(overall, note)}

    def _question(self, images: ImageSet, item: Item) -> Question:
        kind = item.field("edit_type")
        if kind not in self._instructions.texts:
            known = ", ".join(self._instructions.texts)
            raise UserError(f"item '{item.key}': edit_type '{kind}' has no instructions; there are {known}")
        text = self._instructions.texts[kind].replace(EDIT_PROMPT, item.field("instruction"))
        asked = Asked("rating", ("source", "result"), text, FIRST_SEED, text_first=True)
        return question(self._judge, images, item, asked)


def _told(refusals: Sequence[str]) -> dict[str, Any]:
    """The reasons of refusals, for an item's detail."""
    return {"refused": list(refusals)} if refusals else {}


def _by_group(measured: Sequence[Measurement], metric: str) -> list[list[float]]:
    """Values of every group that could be read. A group without values leaves the benchmark without a score.

    A refused item is left out, as if it were not in the set; the note of the score counts the refusals.
    """
    groups: dict[str, list[float]] = {}
    for one in measured:
        if one.values["refused"]:
            continue
        values = groups.setdefault(one.groups[0], [])
        value = float(one.values[metric])  # type: ignore[arg-type]
        if not math.isnan(value):
            values.append(value)
    return list(groups.values())


def _completeness(measured: Sequence[Measurement], n: int, rows: int, num_groups: int, benchmark: str) -> str:
    groups = {one.groups[0] for one in measured}
    num_refused = sum(bool(one.values["refused"]) for one in measured)
    notes = [f"the judge refused {num_refused} of {n} edits"] if num_refused else []
    if n != rows or len(groups) != num_groups:
        notes.append(f"{n} edits in {len(groups)} groups; {benchmark} has {rows} in {num_groups}")
    return "; ".join(notes)
