"""DPG-Bench, GEdit-Bench and ImgEdit-Bench with a judge whose answers are given."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from base.config import UserError
from base.team import Team
from data.image_set import Item, write_image, write_manifest
from evaluation.judge_instructions import ImgEditInstructions, VieInstructions
from evaluation.metrics.dpg import COLUMNS, Graph, Node, answer, image_score, read_graphs
from evaluation.metrics.vie import read_scores, read_three_ratings, sample_scores
from evaluation.runner import evaluate
from evaluation.store import RefusedError
from evaluation.suites.dpg import DpgSuite
from evaluation.suites.edit_benchmarks import GEditSuite, ImgEditSuite


class ScriptedJudge:
    """Answers by a rule on (levels of the images' first pixels, text, seed); counts its calls."""

    name, fingerprint = "scripted", "judge-1"
    protocol: ClassVar = {"judge": "scripted"}

    def __init__(self, rule: Callable[[list[int], str, int], str], die_at: int | None = None) -> None:
        self.rule, self.calls, self.die_at = rule, 0, die_at
        self.sizes: list[list[tuple[int, ...]]] = []

    def __call__(self, images: Sequence[Tensor], text: str, seed: int, text_first: bool = False) -> str:
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.sizes.append([tuple(image.shape[1:]) for image in images])
        return self.rule([int(image[0, 0, 0]) for image in images], text, seed)


def node(number: int, *parents: int, category: str = "entity") -> Node:
    return Node(number, parents, category, f"question {number}?")


@pytest.mark.parametrize(
    ("nodes", "yes", "expected"),
    [
        ([node(1), node(2)], {1: True, 2: False}, 1 / 2),
        ([node(1), node(2, 1), node(3, 2)], {1: False, 2: True, 3: True}, 0.0),  # the whole chain falls
        ([node(1), node(2, 1), node(3, 2)], {1: True, 2: False, 3: True}, 1 / 3),
        ([node(1), node(2), node(3, 1, 2)], {1: True, 2: False, 3: True}, 1 / 3),  # all parents are needed
        ([node(3, 1), node(1)], {1: False, 3: True}, 0.0),  # a child may stand before its parent
        ([node(1), node(2, 1)], {1: True, 2: True}, 1.0),
        ([node(1, 1), node(2, 7)], {1: True, 2: True}, 1.0),  # on itself, and on one that is not there
        ([node(1, 2), node(2, 1)], {1: True, 2: False}, 0.0),  # a circle
    ],
)
def test_a_question_counts_when_all_above_it_are_answered_yes(
    nodes: list[Node], yes: dict[int, bool], expected: float
) -> None:
    assert image_score(Graph("a", "text", tuple(nodes)), yes) == pytest.approx(expected)


def test_answers_are_yes_no_or_unreadable() -> None:
    assert [answer(text) for text in ("yes", " Yes, it is.", "**No**", "no")] == [True, True, False, False]
    assert [answer(text) for text in ("maybe", "", "The answer is yes", "yesterday")] == [None] * 4


def write_csv(path: Path, rows: Sequence[tuple[str, int, str, str]]) -> Path:
    """(item, number, dependency, category)"""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "keywords"])
        writer.writeheader()
        for item, number, dependency, category in rows:
            writer.writerow(
                {
                    "item_id": item,
                    "text": f"prompt, of {item}",
                    "proposition_id": number,
                    "dependency": dependency,
                    "tuple": f"{category} - whole ({item}, {number})",
                    "question_natural_language": f"Is {item} {number} there?",
                }
            )
    return path


ROWS = [
    ("a", 1, "0", "entity"),
    ("a", 2, "1", "attribute"),
    ("b", 1, "0", "entity"),
    ("b", 2, "1", "attribute"),
    ("b", 3, "1, 2", "relation"),
]


def test_graphs_are_read_from_the_benchmarks_table(tmp_path: Path) -> None:
    graphs = read_graphs(write_csv(tmp_path / "dpg.csv", ROWS))
    assert list(graphs) == ["a", "b"] and graphs["b"].prompt == "prompt, of b"
    assert [one.parents for one in graphs["b"].nodes] == [(), (1,), (1, 2)]
    assert [one.category for one in graphs["b"].nodes] == ["entity", "attribute", "relation"]
    assert [graph.num_dangling for graph in graphs.values()] == [0, 0]
    # The official script loses the first row, and with it every prompt that depends on it.
    assert list(read_graphs(tmp_path / "dpg.csv", official_faults=True)) == ["b"]


def test_broken_tables_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.csv:2: proposition_id or dependency"):
        read_graphs(write_csv(tmp_path / "b.csv", [("a", 1, "none", "entity")]))
    (tmp_path / "c.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(UserError, match="has no proposition_id"):
        read_graphs(tmp_path / "c.csv")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_graphs(tmp_path / "absent.csv")


def image(level: int, height: int = 8, width: int = 8) -> Tensor:
    return torch.full((3, height, width), level, dtype=torch.uint8)


def dpg_set(directory: Path, levels: dict[str, Sequence[int]]) -> Path:
    """An image of each level for each item; the level says what is seen on it."""
    items = []
    for item_id, of_item in levels.items():
        for number, level in enumerate(of_item):
            write_image(directory / f"{item_id}-{number}.png", image(level))
            items.append(
                Item(f"{item_id}-{number}", {"result": f"{item_id}-{number}.png"}, {"item_id": item_id})
            )
    write_manifest(directory, items)
    return directory


def by_level(levels: list[int], text: str, seed: int) -> str:
    """Level 0: nothing is there; 1: only number 1; 2: all; 3: no answer."""
    number = int(text.split()[2])
    return {0: "no", 1: "yes" if number == 1 else "no", 2: "Yes.", 3: "I cannot tell"}[levels[0]]


def test_dpg_scores_prompts_images_and_categories(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "dpg.csv", ROWS)
    images = dpg_set(tmp_path / "set", {"a": (2, 0), "b": (1, 3)})
    scores = evaluate(DpgSuite(table, ScriptedJudge(by_level), tmp_path / "store"), images, tmp_path / "out")[
        "scores"
    ]
    # a: 100 and 0; b: a third, and nothing that could be read.
    assert scores["dpg_scripted"]["mean"] == pytest.approx((50 + 100 / 6) / 2)
    assert "2 prompts with 2 images; DPG-Bench has 1065 with 4" in scores["dpg_scripted"]["note"]
    assert scores["image_score"]["n"] == 4 and scores["unparseable"]["mean"] == pytest.approx(3 / 10)
    assert (
        scores["dpg_scripted_entity"]["mean"] == pytest.approx(50) and scores["dpg_scripted_entity"]["n"] == 4
    )
    assert scores["dpg_scripted_attribute"]["mean"] == pytest.approx(25)
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    assert lines[1]["detail"]["failed"] == ["Is a 1 there?", "Is a 2 there?"]


def test_dpg_repeats_the_official_faults_when_asked(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "dpg.csv", ROWS)
    images = dpg_set(tmp_path / "set", {"a": (2, 2), "b": (2, 1)})
    suite = DpgSuite(table, ScriptedJudge(by_level), tmp_path / "store", official_faults=True)
    scores = evaluate(suite, images, tmp_path / "out")["scores"]
    assert scores["dpg_scripted"]["mean"] == pytest.approx((100 + 100 / 3) / 2)  # without a
    assert (
        scores["dpg_scripted_attribute"]["mean"] == 0 and scores["dpg_scripted_attribute"]["n"] == 1
    )  # last image
    with pytest.raises(UserError, match="the questions have no 'c'"):
        evaluate(
            DpgSuite(table, ScriptedJudge(by_level), tmp_path),
            dpg_set(tmp_path / "c", {"c": (2,)}),
            tmp_path / "o",
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "good", "score": [20, 15]}', (20.0, 15.0)),
        ('```json\n{"score" : [12.5, 25], "reasoning": "a "quoted" word"}\n```', (12.5, 25.0)),
        ('{"score": [20]}', None),
        ('{"score": [20, 15, 3]}', None),
        ('{"score": [26, 15]}', None),
        ('{"score": [-1, 15]}', None),
        ('{"score": ["20", 15]}', None),
        ('{"score": 20}', None),
        ('{"score": [1, 2]} or {"score": [3, 4]}', None),
        ("I would say 20 and 15.", None),
        ("", None),
    ],
)
def test_scores_are_read_and_never_guessed(text: str, expected: tuple[float, float] | None) -> None:
    assert read_scores(text, 25) == expected


def test_sample_scores_are_minima_on_a_scale_of_ten() -> None:
    assert sample_scores((25, 10), (20, 25), 25) == pytest.approx((4.0, 8.0, math.sqrt(32)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Brief reasoning: fine.\nPrompt Compliance: 5\nVisual Naturalness: 4\nDetail: 3", (5, 4, 3)),
        ("**Prompt Compliance:** 5\n**Naturalness:** 4.\nDetail: 3/5", (5, 4, 3)),
        ("Prompt Compliance: 5\nNaturalness: 4", None),
        ("A: 5\nB: 4\nC: 3\nD: 2", None),
        ("A: 5\nB: 4\nC: 6", None),
    ],
)
def test_three_ratings_are_read_or_not(text: str, expected: tuple[int, int, int] | None) -> None:
    assert read_three_ratings(text) == expected


VIE_FILE = '''
import os
_context_no_delimit_reasoning_first = """Context."""
_prompts_0shot_two_image_edit_rule = """Two images."""
_prompts_0shot_tie_rule_SC = """From 0 to 10. Instruction: <instruction>"""
_prompts_0shot_rule_PQ = """Picture from 0 to 10."""
raise SystemExit("this file must never be run")
'''


@pytest.fixture
def vie(tmp_path: Path) -> VieInstructions:
    (tmp_path / "vie_prompts.py").write_text(VIE_FILE)
    return VieInstructions.read(tmp_path / "vie_prompts.py")


def test_instructions_are_read_from_the_benchmarks_file_and_not_run(
    vie: VieInstructions, tmp_path: Path
) -> None:
    assert vie.edit == "Context.\nTwo images.\nFrom 0 to 25. Instruction: <instruction>"
    assert vie.picture == "Context.\nPicture from 0 to 25."
    (tmp_path / "other.py").write_text("x = 'y'")
    with pytest.raises(UserError, match="has no _context_no_delimit_reasoning_first"):
        VieInstructions.read(tmp_path / "other.py")
    (tmp_path / "prompts.json").write_text('{"add": "rate it"}')
    with pytest.raises(UserError, match="is not ImgEdit-Bench's prompts"):
        ImgEditInstructions.read(tmp_path / "prompts.json")


def edit_set(directory: Path, groups: Sequence[str], **meta: Any) -> Path:
    """Item i: source of level 0, 8 x 12 px, result of level i + 1, 8 x 8 px."""
    items = []
    for index, group in enumerate(groups):
        write_image(directory / f"{index}.source.png", image(0, 8, 12))
        write_image(directory / f"{index}.result.png", image(index + 1))
        names = {role: f"{index}.{role}.png" for role in ("source", "result")}
        fields = {"task_type": group, "edit_type": group, "instruction": f"do {index}", **meta}
        items.append(Item(str(index), names, fields))
    write_manifest(directory, items)
    return directory


EDITS = {1: [25, 20], 2: [10, 25], 3: [5, 5]}
PICTURES = {1: [25, 25], 2: [10, 20], 3: [20, 25]}


def vie_rule(levels: list[int], text: str, seed: int) -> str:
    """Item 3's second pass cannot be read; item 2's second pass is worse."""
    table = EDITS if len(levels) == 2 else PICTURES
    if levels[-1] == 3 and seed == 43:
        return "sorry"
    return json.dumps({"reasoning": text[-4:], "score": table[levels[-1]] if seed == 42 else [5, 5]})


def test_gedit_averages_passes_samples_and_groups_in_this_order(vie: VieInstructions, tmp_path: Path) -> None:
    images = edit_set(tmp_path / "set", ["style_change", "style_change", "subject-add"])
    judge = ScriptedJudge(vie_rule)
    scores = evaluate(GEditSuite(vie, judge, tmp_path / "store", num_passes=2), images, tmp_path / "out")[
        "scores"
    ]
    first = (math.sqrt(8 * 10) + 2) / 2  # SC 8, PQ 10; then 2 and 2
    second = (math.sqrt(4 * 4) + 2) / 2
    third = math.sqrt(2 * 8)  # its other pass could not be read
    assert scores["g_o_scripted"]["mean"] == pytest.approx(((first + second) / 2 + third) / 2)
    assert scores["g_sc_scripted"]["mean"] == pytest.approx(((5 + 3) / 2 + 2) / 2)
    assert scores["o"]["mean"] == pytest.approx((first + second + third) / 3)
    assert scores["unparseable"]["mean"] == pytest.approx(1 / 6)
    assert "3 edits in 2 groups; GEdit-Bench-EN has 606 in 11" in scores["g_o_scripted"]["note"]
    # Both questions show the result in the source's size.
    assert {tuple(sizes) for sizes in judge.sizes} == {((8, 12), (8, 12)), ((8, 12),)}
    assert judge.calls == 12


def test_a_group_that_nobody_could_read_leaves_no_score(vie: VieInstructions, tmp_path: Path) -> None:
    images = edit_set(tmp_path / "set", ["style_change", "subject-add"])
    judge = ScriptedJudge(lambda levels, text, seed: "?" if levels[-1] == 2 else '{"score": [5, 5]}')
    scores = evaluate(GEditSuite(vie, judge, tmp_path / "store"), images, tmp_path / "out")["scores"]
    assert scores["g_o_scripted"]["mean"] is None and scores["o"]["n"] == 1


def test_other_languages_are_refused(vie: VieInstructions, tmp_path: Path) -> None:
    images = edit_set(tmp_path / "set", ["style_change"], instruction_language="cn")
    with pytest.raises(UserError, match="is not English"):
        evaluate(GEditSuite(vie, ScriptedJudge(vie_rule), tmp_path / "store"), images, tmp_path / "out")


def test_a_killed_judging_goes_on_to_the_same_bytes_on_any_ranks(
    vie: VieInstructions, tmp_path: Path
) -> None:
    images = edit_set(tmp_path / "set", ["style_change", "style_change", "subject-add"])

    def run(store: str, judge: ScriptedJudge, team: Team) -> None:
        evaluate(
            GEditSuite(vie, judge, tmp_path / store, num_passes=2),
            images,
            tmp_path / f"{store}-out",
            team=team,
        )

    run("whole", ScriptedJudge(vie_rule), Team())
    with pytest.raises(KeyboardInterrupt):
        run("killed", ScriptedJudge(vie_rule, die_at=5), Team())
    second = ScriptedJudge(vie_rule)
    run("killed", second, Team(1, 2))
    run("killed", second, Team(0, 2))
    assert second.calls == 12 - 5
    for name in ("scores.json", "per_item.jsonl"):
        assert (tmp_path / "whole-out" / name).read_bytes() == (tmp_path / "killed-out" / name).read_bytes()


def test_imgedit_averages_kinds_of_edits(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(
        json.dumps({"add": "Add: <edit_prompt>", "style": "Style: <edit_prompt>"})
    )
    instructions = ImgEditInstructions.read(tmp_path / "prompts.json")
    images = edit_set(tmp_path / "set", ["add", "add", "style"])
    answers = {1: "A: 5\nB: 4\nC: 3", 2: "A: 1\nB: 1\nC: 1", 3: "A: 2\nB: 2\nC: 2"}
    judge = ScriptedJudge(lambda levels, text, seed: answers[levels[1]])
    scores = evaluate(ImgEditSuite(instructions, judge, tmp_path / "store"), images, tmp_path / "out")[
        "scores"
    ]
    assert scores["imgedit_scripted"]["mean"] == pytest.approx(((4 + 1) / 2 + 2) / 2)
    assert judge.sizes[0] == [(8, 12), (8, 8)]  # as they are
    with pytest.raises(UserError, match="edit_type 'action' has no instructions"):
        evaluate(
            ImgEditSuite(instructions, judge, tmp_path / "store"),
            edit_set(tmp_path / "b", ["action"]),
            tmp_path / "o",
        )


def refusing(rule: Callable[[list[int], str, int], str], level: int) -> ScriptedJudge:
    """A judge that will not look at images whose last one has this level."""

    def answer_or_refuse(levels: list[int], text: str, seed: int) -> str:
        if levels[-1] == level:
            raise RefusedError("status 400: content_filter")
        return rule(levels, text, seed)

    return ScriptedJudge(answer_or_refuse)


def test_a_refused_edit_costs_itself_and_is_named(vie: VieInstructions, tmp_path: Path) -> None:
    images = edit_set(tmp_path / "set", ["style_change", "style_change", "subject-add"])
    for level, overall in (
        (1, (4 + 4) / 2),
        (3, (math.sqrt(80) + 4) / 2),
    ):  # one of two in a group; a whole group
        store, out = tmp_path / f"store-{level}", tmp_path / f"out-{level}"
        scores = evaluate(GEditSuite(vie, refusing(vie_rule, level), store), images, out)["scores"]
        assert scores["g_o_scripted"]["mean"] == pytest.approx(overall)
        assert scores["g_o_scripted"]["note"].startswith("the judge refused 1 of 3 edits")
        assert scores["refused"]["mean"] == pytest.approx(1 / 3) and scores["refused"]["n"] == 3
        assert scores["unparseable"]["n"] == 2
        lines = [json.loads(line) for line in (out / "per_item.jsonl").read_text().splitlines()]
        assert lines[level - 1]["detail"]["refused"][0] == "status 400: content_filter"


def test_an_image_with_a_refused_question_has_no_dpg_score(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "dpg.csv", ROWS)
    images = dpg_set(tmp_path / "set", {"a": (2, 0), "b": (1, 3)})
    suite = DpgSuite(table, refusing(by_level, 0), tmp_path / "store")
    scores = evaluate(suite, images, tmp_path / "out")["scores"]
    assert scores["dpg_scripted"]["mean"] == pytest.approx((100 + 100 / 6) / 2)
    assert "the judge refused 1 of 4 images" in scores["dpg_scripted"]["note"]
    assert scores["refused"]["mean"] == pytest.approx(1 / 4) and scores["image_score"]["n"] == 3
    everything = DpgSuite(table, ScriptedJudge(refuse_all), tmp_path / "none")
    assert evaluate(everything, images, tmp_path / "out-none")["scores"]["dpg_scripted"]["mean"] is None


def refuse_all(levels: list[int], text: str, seed: int) -> str:
    raise RefusedError("status 400: content_filter")


def test_a_refused_imgedit_item_leaves_the_others_scores(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"add": "Add: <edit_prompt>"}))
    instructions = ImgEditInstructions.read(tmp_path / "prompts.json")
    images = edit_set(tmp_path / "set", ["add", "add", "add"])
    judge = refusing(lambda levels, text, seed: f"A: {levels[1]}\nB: {levels[1]}\nC: {levels[1]}", 2)
    scores = evaluate(ImgEditSuite(instructions, judge, tmp_path / "store"), images, tmp_path / "out")[
        "scores"
    ]
    assert scores["imgedit_scripted"]["mean"] == pytest.approx((1 + 3) / 2)
    assert scores["rating"]["n"] == scores["unparseable"]["n"] == 2
