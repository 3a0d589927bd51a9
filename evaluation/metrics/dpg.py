"""DPG-Bench's arithmetic (Hu et al. 2024): yes/no questions in a dependency graph, read from its CSV file.

A question counts 1 when it and all its ancestors are answered yes. An image's score is the share of its questions that
count, a prompt's the mean over its images, the benchmark's 100 times the mean over prompts. Categories count the
answers themselves, without dependencies. A dependency on a question that is not in the table is ignored (and counted,
see `num_dangling`); in a circle every question depends on its own answer alone.

The official script differs in three ways, which `official_faults` repeats: it skips the file's first row; a prompt
whose questions depend on a missing question fails and is left out; categories use only the last of a prompt's images.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from base.config import UserError
from data.sources.text_files import read_text

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
NUM_PROMPTS, IMAGES_PER_PROMPT = 1065, 4


@dataclass(frozen=True)
class Node:
    """One question of a graph."""

    number: int
    parents: tuple[int, ...]  # numbers of the questions it depends on
    category: str  # entity, attribute, relation, global, other
    text: str


@dataclass(frozen=True)
class Graph:
    """The questions about one prompt."""

    item_id: str
    prompt: str
    nodes: tuple[Node, ...]  # in the file's order

    @property
    def num_dangling(self) -> int:
        """Number of dependencies on questions that are not in the graph."""
        numbers = {node.number for node in self.nodes}
        return sum(parent not in numbers for node in self.nodes for parent in node.parents)


def read_graphs(path: Path, official_faults: bool = False) -> dict[str, Graph]:
    """The graph of every item id. Raises UserError naming the row: no such file, another table, no number."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(path, "CSV"), newline=""))
        rows = list(enumerate(reader, start=2))
        absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); give dpg_bench.csv") from None
    if absent or not rows:
        raise UserError(f"{path}: has no {', '.join(absent) or 'rows'}; give dpg_bench.csv of DPG-Bench")
    nodes: dict[str, list[Node]] = {}
    prompts: dict[str, str] = {}
    for number, row in rows[1:] if official_faults else rows:
        try:
            node = Node(
                int(row["proposition_id"]),
                tuple(int(part) for part in row["dependency"].split(",") if int(part) != 0),
                row["tuple"].split("(")[0].split("-")[0].strip(),
                row["question_natural_language"].strip(),
            )
            if not row["item_id"]:
                raise ValueError("item_id")
        except (ValueError, AttributeError, TypeError):
            raise UserError(
                f"{path}:{number}: proposition_id or dependency is no number; fetch it again"
            ) from None
        nodes.setdefault(row["item_id"], []).append(node)
        prompts.setdefault(row["item_id"], row["text"])
    graphs = {key: Graph(key, prompts[key], tuple(found)) for key, found in nodes.items()}
    if official_faults:
        return {key: graph for key, graph in graphs.items() if graph.num_dangling == 0}
    return graphs


def answer(text: str) -> bool | None:
    """Whether a judge says yes; None if its first word is neither yes nor no."""
    word = re.match(r"\W*([a-z]+)", text.lower())
    return {"yes": True, "no": False}.get(word[1]) if word else None


def image_score(graph: Graph, answers: Mapping[int, bool]) -> float:
    """Share of the questions that count, 0 to 1. `answers`: question number -> yes."""
    counts: dict[int, bool] = {}
    by_number = {node.number: node for node in graph.nodes}

    def holds(number: int) -> bool:
        if number not in counts:
            counts[number] = answers[number]  # the value that a circle finds when it closes
            parents = [parent for parent in by_number[number].parents if parent in by_number]
            counts[number] = answers[number] and all(holds(parent) for parent in parents)
        return counts[number]

    return sum(holds(node.number) for node in graph.nodes) / len(graph.nodes)
