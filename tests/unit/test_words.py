"""Docstrings name their subject: rules of the project's prose that a machine can check without being wrong."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from base import FOLDERS, sources

ROOT = Path(__file__).parents[2]
FILES = sources(ROOT, "benchmarks")
PLACES = (*FOLDERS, "benchmarks")


@dataclass(frozen=True)
class Text:
    """A docstring: of a module, class or function, or the string under an assignment that documents it."""

    place: str
    words: str


def blocks(node: ast.AST) -> list[ast.stmt]:
    body = getattr(node, "body", [])
    return body if isinstance(body, list) else []  # an expression's body (lambda, ... if ...) is no list


def texts_of(source: str, name: str) -> Iterator[Text]:
    for node in ast.walk(ast.parse(source)):
        for statement in blocks(node):
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield Text(f"{name}:{statement.lineno}", " ".join(value.value.split()))


@functools.cache
def texts(path: Path) -> tuple[Text, ...]:
    return tuple(texts_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()))


def riddle(words: str) -> str | None:
    """The rule that a docstring breaks; None: it breaks none."""
    if re.match(r"Of\b", words):
        return "starts with 'Of': name what the number or text is"
    if re.match(r"(?i)(the same( as above| again| here)?|likewise|ditto|see above|as above)\b[^\w]*$", words):
        return "only refers to its neighbour: say it here"
    if re.match(r"(And|But|Or|Nor|Which|Whose|Those|These|They|Them)\b", words):
        return "begins in the middle of a sentence: name the subject"
    return None


@pytest.mark.parametrize("folder", PLACES)
def test_every_module_with_code_says_what_it_is(folder: str) -> None:
    modules = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder and path.stat().st_size]
    assert modules
    assert not [path for path in modules if ast.get_docstring(ast.parse(path.read_text())) is None]


@pytest.mark.parametrize("folder", PLACES)
def test_no_docstring_is_a_riddle(folder: str) -> None:
    found = [text for path in FILES if path.relative_to(ROOT).parts[0] == folder for text in texts(path)]
    assert len(found) > 100
    assert not [f"{text.place}: {rule}: {text.words[:60]}" for text in found if (rule := riddle(text.words))]


@pytest.mark.parametrize(
    ("words", "is_riddle"),
    [
        ("Of one engine on one rank, without activations.", True),
        ("See above.", True),
        ("The same as above.", True),
        ("And the command: a file in a folder.", True),
        ("Those directly in it.", True),
        ("Offset of the payload.", False),
        ("The same seeds give the same bits.", False),
        ("See Source.", False),
        ("Order of samples.", False),
        ("Theses of a student.", False),
    ],
)
def test_a_riddle_is_told_from_a_sentence(words: str, is_riddle: bool) -> None:
    assert (riddle(words) is not None) is is_riddle


def test_docstrings_of_every_place_are_read() -> None:
    source = '"""M."""\nA = 1\n"""A."""\nclass C:\n    """C."""\n    x: int\n    """X."""\n'
    source += '    def f(self):\n        """F."""\n'
    assert [text.words for text in texts_of(source, "m")] == ["M.", "A.", "C.", "X.", "F."]
