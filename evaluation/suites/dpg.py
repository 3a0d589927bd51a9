"""DPG-Bench: how much of a long prompt an image shows, according to a judge that answers yes or no.

The official judge is mPLUG-large of modelscope, which does not run here. Every other judge's score is a separate
metric that carries the judge's name: `dpg_qwen3vl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files
from base.config import UserError
from data.image_set import ImageSet, Item
from evaluation.judges.interface import Asked, VisionLanguageJudge, question
from evaluation.metrics.dpg import (
    IMAGES_PER_PROMPT,
    NUM_PROMPTS,
    Graph,
    Node,
    answer,
    image_score,
    read_graphs,
)
from evaluation.metrics.interval import mean
from evaluation.runner import Measurement, SetScore, Value
from evaluation.store import Question, RecordStore, Refusal, share

ASK = "{question} Answer with one word, yes or no."
SEED = 42


class DpgSuite:
    """Implements Suite, SetSuite and CollectingSuite of evaluation.runner. Items name their prompt in meta.item_id.

    An answer that is neither yes nor no counts as not yes, and in `unparseable`. An image about which the judge refused
    a question has no score, and counts in `refused`.
    """

    name = "dpg"
    roles = ("result",)

    def __init__(
        self, graphs_path: Path, judge: VisionLanguageJudge, store: Path, *, official_faults: bool = False
    ) -> None:
        """Raises UserError as read_graphs does."""
        self._graphs = read_graphs(graphs_path, official_faults)
        self._judge, self._store, self._official_faults = judge, store, official_faults
        self._metric = f"dpg_{judge.name}"
        self.protocol: Mapping[str, Any] = {
            "question": ASK,
            "score": "100 x share of questions answered yes whose dependencies are, mean over images, then prompts",
            "official_faults": official_faults,
            "dependencies passed over": sum(graph.num_dangling for graph in self._graphs.values()),
            **judge.protocol,
        }
        self.fingerprints: Mapping[str, str] = {
            "judge": judge.fingerprint,
            "questions": files.sha256(graphs_path),
        }

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Asks the judge about this rank's images."""
        questions = [
            asked
            for item in share(items, rank, world)
            for node in self._nodes(item)
            for asked in [self._question(images, item, node)]
        ]
        RecordStore(self._store, rank).answer(questions, f"rank {rank}: DPG-Bench")

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """`image_score` of every image, 0 to 100; the detail lists questions that are not answered yes."""
        found = []
        for graph, said, refusals in self._answers(images, items):
            if graph is None:
                found.append(
                    Measurement({}, detail={"left out": "its graph lacks a question (official fault)"})
                )
                continue
            if refusals:
                found.append(Measurement({"refused": True}, detail={"refused": refusals}))
                continue
            yes = {number: bool(value) for number, value in said.items()}
            failed = [node.text for node in graph.nodes if not yes[node.number]]
            unparseable = tuple(value is None for value in said.values())
            values: dict[str, Value] = {
                "image_score": 100 * image_score(graph, yes),
                "unparseable": unparseable,
                "refused": False,
            }
            found.append(Measurement(values, detail={"failed": failed}))
        return found

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The score over prompts, and the share of yes in every category."""
        by_prompt: dict[str, list[float]] = {}
        categories: dict[str, dict[str, list[list[float]]]] = {}  # category -> item id -> image -> answers
        num_refused = 0
        for graph, said, refusals in self._answers(images, items):
            num_refused += bool(refusals)
            if graph is None or refusals:
                continue
            yes = {number: bool(value) for number, value in said.items()}
            by_prompt.setdefault(graph.item_id, []).append(100 * image_score(graph, yes))
            by_category: dict[str, list[float]] = {}
            for node in graph.nodes:
                by_category.setdefault(node.category, []).append(100.0 * yes[node.number])
            for category, values in by_category.items():
                categories.setdefault(category, {}).setdefault(graph.item_id, []).append(values)
        counts = {len(values) for values in by_prompt.values()}
        note = ""
        if len(by_prompt) != NUM_PROMPTS or counts != {IMAGES_PER_PROMPT}:
            each = " or ".join(map(str, sorted(counts)))
            note = f"{len(by_prompt)} prompts with {each} images; DPG-Bench has {NUM_PROMPTS} with 4"
        if num_refused:
            note += f"{'; ' * bool(note)}the judge refused {num_refused} of {len(items)} images"
        scores = {self._metric: SetScore.of(mean([sum(v) / len(v) for v in by_prompt.values()]), note)}
        for category, prompts in sorted(categories.items()):
            answers = [
                value
                for of_images in prompts.values()
                for one in (of_images[-1:] if self._official_faults else of_images)
                for value in one
            ]
            scores[f"{self._metric}_{category}"] = SetScore(sum(answers) / len(answers), len(answers))
        return scores

    def _answers(
        self, images: ImageSet, items: Sequence[Item]
    ) -> Iterator[tuple[Graph | None, dict[int, bool | None], list[str]]]:
        """Yields each item's graph, the judge's answers by question number, and the reasons of refusals."""
        store = RecordStore(self._store)
        for item in items:
            found = {
                node.number: store.find(*self._question(images, item, node).key) for node in self._nodes(item)
            }
            said = {n: answer(str(one)) for n, one in found.items() if not isinstance(one, Refusal)}
            refusals = [one.reason for one in found.values() if isinstance(one, Refusal)]
            yield self._graphs.get(item.field("item_id")), said, refusals

    def _nodes(self, item: Item) -> tuple[Node, ...]:
        graph = self._graphs.get(item.field("item_id"))
        if graph is None and not self._official_faults:
            raise UserError(f"item '{item.key}': the questions have no '{item.field('item_id')}'")
        return graph.nodes if graph is not None else ()

    def _question(self, images: ImageSet, item: Item, node: Node) -> Question:
        asked = Asked(str(node.number), ("result",), ASK.format(question=node.text), SEED)
        return question(self._judge, images, item, asked)
