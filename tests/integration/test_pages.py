"""Nothing that stands in an input becomes an element, an attribute or an address of a page: one builder escapes."""

from __future__ import annotations

import ast
import copy
import dataclasses
import html.parser
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from base import sources
from base.config import UserError
from data.doctor.examine_set import diagnose
from data.doctor.findings import Problem
from integration.scripts import fuzz_data, fuzz_scores
from report import benchmarks, doctor, render_report
from report.charts import Curve, bar_chart, chart_file, curve_chart, stacked_bar
from report.page import page as report_page
from report.run_contents import read_report_input
from report.verdicts import outcomes
from report.watch import page as watch_page
from report.watch import read_run

ROOT = Path(__file__).parents[2]
EVIL = (
    """<script>alert(1)</script>" onload="alert(2)' onclick='alert(3) {{ 7 * 6 }} """
    """</style></title></text>--><evil x=1><svg/onload=x>\ud83d"""
)
TAG_NAMES = """
html head meta title style body header section h1 h2 h3 p ul ol li dl dt dd b i a br span small div details summary
table thead tbody tr th td figure figcaption img svg g path text
"""
ATTRIBUTE_NAMES = """
lang charset name content class style href src alt width height viewbox role aria-label title x y d
transform open
"""
TAGS = frozenset(TAG_NAMES.split())
ATTRIBUTES = frozenset(ATTRIBUTE_NAMES.split())
FILE_TAGS = TAGS | {"defs", "use"}  # of a chart that stands alone
FILE_ATTRIBUTES = ATTRIBUTES | {"id", "type", "version", "xmlns", "xmlns:xlink", "xlink:href"}
OF_OURS = re.compile(r"https://creativecommons\.org/|data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$")
TAG = re.compile(rf"(?<![Pg])</?({'|'.join(TAGS | {'script', 'link', 'iframe'})})[ >/]")
BUILDER = "report/markup.py"


class Harmless(html.parser.HTMLParser):
    """Fails at an element or an attribute that no template of ours has; keeps the text, that of tooltips too."""

    def __init__(
        self, page: str, tags: Collection[str] = TAGS, attributes: Collection[str] = ATTRIBUTES
    ) -> None:
        super().__init__()
        self._tags, self._attributes = tags, attributes
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in self._tags, tag
        for name, value in attributes:
            assert name in self._attributes, (tag, name)
            if name in ("href", "src"):
                assert OF_OURS.match(value or ""), (tag, value)
            elif name == "xlink:href":
                assert re.fullmatch(r"#\w+", value or ""), (tag, value)
            elif name == "title":
                self.text += value or ""
            elif name not in ("alt", "aria-label"):
                assert "alert" not in (value or ""), (tag, name, value)

    def handle_data(self, data: str) -> None:
        self.text += data
        assert " 42 " not in data, "a value was taken for a template"


def with_evil(tree: Any) -> Iterator[Any]:
    """The tree with EVIL in place of each of its leaves, then of each of its names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield {(EVIL if name == key else name): other for name, other in tree.items()}
            for changed in with_evil(value):
                yield {**tree, key: changed}
    elif isinstance(tree, list):
        for at, value in enumerate(tree):
            for changed in with_evil(value):
                yield [*tree[:at], changed, *tree[at + 1 :]]
    else:
        yield EVIL


def changed_files(folder: Path, stride: int) -> Iterator[str]:
    """Each JSON file of the folder, changed in place and put back: one leaf or name of `stride` at a time."""
    for path in sorted([*folder.glob("**/*.json"), *folder.glob("**/*.jsonl")]):
        if path.name == "report.json":
            continue
        before = path.read_bytes()
        rows = (
            [json.loads(line) for line in before.splitlines()]
            if path.suffix == ".jsonl"
            else json.loads(before)
        )
        for changed in itertools.islice(with_evil(rows), 0, None, stride):
            lines = changed if path.suffix == ".jsonl" and isinstance(changed, list) else [changed]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            yield f"{path}: {json.dumps(changed)[:300]}"
        path.write_bytes(before)


PAGES: dict[str, tuple[Callable[[Path], object], Callable[[Path], str]]] = {
    "report": (fuzz_scores.scores, lambda folder: render_report(folder).read_text()),
    "scores": (
        fuzz_scores.scores,
        lambda folder: benchmarks.page(
            [benchmarks.read_run(folder / "evaluation"), benchmarks.read_run(folder)]
        ),
    ),
    "watch": (
        fuzz_scores.run_folder,
        lambda folder: (
            watch_page([read_run(folder)], now_s=1e9)
            + watch_page([read_run(folder, "a"), read_run(folder)], now_s=1e9)
        ),
    ),
}


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(("make", "render"), PAGES.values(), ids=PAGES)
def test_no_leaf_of_a_file_becomes_an_element(
    make: Callable[[Path], object], render: Callable[[Path], str], stride: int, tmp_path: Path
) -> None:
    make(tmp_path)
    assert "alert" not in Harmless(render(tmp_path)).text
    shown = refused = 0
    for what in changed_files(tmp_path, stride):
        try:
            page = render(tmp_path)
        except UserError:
            refused += 1
            continue
        try:
            shown += "alert(1)" in Harmless(page).text
        except AssertionError as error:
            raise AssertionError(what) from error
    assert shown >= 8 / stride and refused > 5 / stride


def evil_everywhere(value: Any) -> Any:
    """Every text in a value of dataclasses replaced; what is counted or drawn stays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            if field.name not in ("latent", "parts"):
                object.__setattr__(changed, field.name, evil_everywhere(getattr(value, field.name)))
        return changed
    if isinstance(value, tuple | list):
        return type(value)(map(evil_everywhere, value))
    return EVIL if isinstance(value, str) else value


def test_no_text_of_a_diagnosis_becomes_an_element(tmp_path: Path) -> None:
    fuzz_data.pixel_shards(tmp_path)
    found = diagnose(tmp_path)
    bad = dataclasses.replace(
        found,
        problems=(*found.problems, Problem("sample", "x")),
        shown=tuple(dataclasses.replace(one, problems=("x",)) for one in found.shown[:1]) + found.shown[1:],
    )
    changed = dataclasses.replace(
        evil_everywhere(bad), directory=EVIL.rstrip("\ud83d")
    )  # no name of a file has that
    for shown in changed.shown:
        evil = json.dumps({"captions": {EVIL: EVIL}}).encode()
        object.__setattr__(shown.sample, "parts", {**shown.sample.parts, "json": evil, f"{EVIL}.png": b""})
    page = doctor.page(changed)
    assert Harmless(page).text.count("alert(1)") > 30


def test_no_name_of_a_run_or_a_machine_becomes_an_element(tmp_path: Path) -> None:
    fuzz_scores.scores(tmp_path)
    fuzz_scores.run_folder(tmp_path)
    scored = dataclasses.replace(benchmarks.read_run(tmp_path), name=EVIL)
    assert Harmless(benchmarks.page([scored, benchmarks.read_run(tmp_path)])).text.count("alert(1)") > 5
    logged = dataclasses.replace(read_run(tmp_path, EVIL), path=Path(EVIL))
    for runs in ([logged], [logged, read_run(tmp_path)]):
        assert "alert(1)" in Harmless(watch_page(runs, now_s=1e9)).text
    report = read_report_input(tmp_path)
    evil = dataclasses.replace(
        report,
        machine={EVIL: EVIL},
        versions={EVIL: EVIL},
        trainings=tuple(dataclasses.replace(one, name=EVIL) for one in report.trainings),
        evaluations={
            f"{EVIL}{name}": dataclasses.replace(one, name=EVIL) for name, one in report.evaluations.items()
        },
    )
    assert Harmless(report_page(evil, outcomes(evil))).text.count("alert(1)") > 4


def test_no_name_of_a_chart_becomes_an_element() -> None:
    curves = [Curve("a", [(1.0, 2.0), (2.0, 3.0)]), Curve("b", [(1.0, 2.0)], 1, level=0.5)]
    evil = [dataclasses.replace(curve, name=EVIL) for curve in curves]
    file = Harmless(chart_file(evil, EVIL), FILE_TAGS, FILE_ATTRIBUTES)
    assert file.text.count("alert(1)") == 3
    assert Harmless(str(stacked_bar([(EVIL, 0.5)], EVIL))).text.count("alert(1)") == 1
    bars = Harmless(str(bar_chart([(EVIL, 1.0, EVIL)], EVIL)))
    assert bars.text.count("alert(1)") == 2
    marked = curve_chart(evil, EVIL, marks=[(1.0, EVIL)])
    assert Harmless(str(marked)).text.count("alert(1)") == 1


def parsed() -> list[tuple[str, ast.Module]]:
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in sources(ROOT)]


def test_html_is_made_in_one_place_from_constants() -> None:
    """Templates are constants of their module; no other text that a program puts together holds a tag."""
    num_templates = 0
    for name, tree in parsed():
        if name == BUILDER:
            continue
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not {"html", "markupsafe", "jinja2", "xml"} & {
                    module.split(".")[0] for module in modules
                }, name
            if isinstance(
                node, ast.JoinedStr | ast.BinOp | ast.Attribute
            ):  # f"", + and %, "".format and join
                texts = [getattr(part, "value", "") for part in ast.iter_child_nodes(node)]
                found = [text for text in texts if isinstance(text, str) and TAG.search(text)]
                assert not found, f"{name}:{node.lineno}: {found}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fill":
                first = node.args[0]
                template = (
                    first.value
                    if isinstance(first, ast.Constant)
                    else constants.get(getattr(first, "id", ""))
                )
                assert isinstance(template, str), f"{name}:{node.lineno}: no constant template"
                assert not re.search(r"\|\s*safe|autoescape|\w='?{{", template), (
                    name,
                    template,
                )
                assert not re.search(r"(href|on\w+)\s*=\s*[\"']?[^\"'>]*{{", template), (name, template)
                num_templates += 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "document":
                styles = [part for part in ast.walk(node.args[1]) if isinstance(part, ast.expr)]
                assert all(
                    isinstance(part, ast.BinOp) or getattr(part, "id", "").isupper() for part in styles
                ), name
    assert num_templates > 30
