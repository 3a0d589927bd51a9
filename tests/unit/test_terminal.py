"""Nothing that is printed steers a terminal, and nothing is printed past the function that sees to it."""

import ast
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import terminal
from engine.config import UserError
from launch import entry

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "tokenizer", "generator", "evaluation", "engine", "launch")


def written_past(tree: ast.AST) -> Iterator[str]:
    """Calls that print, and any other use of this process's streams than to ask about them or to pass them to say."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        streams = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
        given = {ast.unparse(argument) for argument in (*node.args, *(word.value for word in node.keywords))}
        writes = name.rpartition(".")[0].removesuffix(".buffer") in streams and ".write" in name
        if name in ("print", "builtins.print", "pprint", "pprint.pprint", "traceback.print_exc") or writes:
            yield f"line {node.lineno}: {name}"
        elif given & streams and name.rpartition(".")[2] != "say":
            yield f"line {node.lineno}: {name} gets a stream"


def test_no_source_file_prints_but_by_say() -> None:
    met = 0
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        met += sum(
            isinstance(n, ast.Call) and ast.unparse(n.func) in ("say", "terminal.say") for n in ast.walk(tree)
        )
        if path != ROOT / "engine" / "terminal.py":
            assert list(written_past(tree)) == [], path
    assert met > 50


@pytest.mark.parametrize(
    "line",
    [
        "print(x)",
        "print(f'{x}', file=sys.stderr)",
        "sys.stdout.write(x)",
        "sys.stderr.buffer.write(x)",
        "dump(x, sys.stdout)",
    ],
)
def test_the_search_finds_each_kind(line: str) -> None:
    assert list(written_past(ast.parse(line)))
    assert not list(written_past(ast.parse("say(x, sys.stderr); sys.stdout.flush(); sys.stdout.isatty()")))


def bytes_of(text: str, encoding: str = "utf-8") -> bytes:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    terminal.say(text, stream)
    return raw.getvalue()


@given(st.text(st.characters(codec=None)))
def test_whatever_is_said_reaches_the_terminal_without_controls(text: str) -> None:
    """Seven-bit escapes, the one-byte forms of C1, and halves of characters, which could not even be written."""
    for encoding in ("utf-8", "ascii", "latin-1"):
        shown = bytes_of(text, encoding).decode(encoding)
        assert shown.endswith("\n")
        assert not [
            sign for sign in shown if (ord(sign) < 32 or 127 <= ord(sign) < 160) and sign not in "\n\t"
        ]
        assert not set(shown) & set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2028\u2029")


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Zeile 1\n\tAEä 漢字 👩\u200d🚀 5\u00a0% ▒"
    assert bytes_of(text).decode() == text + "\n"
    assert bytes_of("\x1b]0;title\x07 a\rb") == b"\\x1b]0;title\\x07 a\\rb\n"


def test_a_name_with_escapes_in_an_error_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("member '\x1b[2J\x1b]0;owned\x07': no such part")

    assert entry.run(fail) == 2
    assert capsys.readouterr().err == "error: member '\\x1b[2J\\x1b]0;owned\\x07': no such part\n"


def test_a_screen_keeps_its_colours_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show("\x1b[31mred\x1b[0m \x1b[2J\x07\n")
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m \\x1b[2J\\x07\n"


def test_a_terminal_that_is_not_utf8_ends_nothing() -> None:
    program = "from engine.terminal import say; say('ä \\u6f22 \\ud800')"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=environment, check=True
    )
    assert done.stdout == b"\\xe4 \\u6f22 \\ud800\n"
