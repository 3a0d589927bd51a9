"""Nothing that is printed steers a terminal, and nothing is printed past the function that sees to it."""

import ast
import errno
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base import sources, terminal
from base.config import UserError
from launch.runs import entry

ROOT = Path(__file__).parents[3]


def written_past(tree: ast.AST) -> Iterator[str]:
    """Calls that print, and any other use of this process's streams than to ask about them or to pass them to say."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        streams = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
        values = (*node.args, *(word.value for word in node.keywords))
        given = {ast.unparse(value) for value in values if isinstance(value, ast.Attribute)}
        writes = name.rpartition(".")[0].removesuffix(".buffer") in streams and ".write" in name
        if name in ("print", "builtins.print", "pprint", "pprint.pprint", "traceback.print_exc") or writes:
            yield f"line {node.lineno}: {name}"
        elif given & streams and name.rpartition(".")[2] != "say":
            yield f"line {node.lineno}: {name} gets a stream"


def test_no_source_file_prints_but_by_say() -> None:
    met = 0
    for path in sources(ROOT):
        tree = ast.parse(path.read_text())
        met += sum(
            isinstance(n, ast.Call) and ast.unparse(n.func) in ("say", "terminal.say") for n in ast.walk(tree)
        )
        if path != ROOT / "base" / "terminal.py":
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
    program = "from base.terminal import say; say('ä \\u6f22 \\ud800')"
    environment = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, env=environment, check=True
    )
    assert done.stdout == b"\\xe4 \\u6f22 \\ud800\n"


def run_with(stdout: str, program: str, *, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `program` under a shell with stdout directed as `stdout` says; `shell` comes before it."""
    command = f'{shell}"$0" -c "$1" {stdout}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


FULL = """
import resource, sys
from base.terminal import say
limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
say("before")
limit(0)
for number in range(3000):
    say(f"{number:05d}" * 20)
if {has_room_again}:
    limit(resource.RLIM_INFINITY)
    say("after")
sys.exit(7)
"""


@pytest.mark.parametrize("has_room_again", [False, True])
def test_a_full_disk_behind_stdout_ends_nothing_and_is_said_once(
    tmp_path: Path, has_room_again: bool
) -> None:
    out = tmp_path / "out"
    program = FULL.replace("{has_room_again}", str(has_room_again))
    result = run_with(f"> {out}", program)
    assert result.returncode == 7, result.stderr
    assert result.stderr == "WARNING: stdout: File too large; what cannot be printed is lost\n"
    printed = out.read_text().splitlines()
    assert printed[0] == "before" and (printed[-1] == "after") == has_room_again


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_an_output_that_takes_nothing_ends_nothing() -> None:
    result = run_with(
        "> /dev/full", "from base.terminal import say; import sys; say('x'); say('y'); sys.exit(7)"
    )
    assert result.returncode == 7
    assert result.stderr == "WARNING: stdout: No space left on device; what cannot be printed is lost\n"


def test_with_a_closed_stdout_no_file_gets_its_number() -> None:
    """What a library prints would go there."""
    program = (
        "import os, sys; from base import terminal; terminal.hold(); terminal.say('x')\n"
        "number = os.open('/dev/null', os.O_RDONLY); terminal.flush()\n"
        "sys.exit(os.spawnlp(os.P_WAIT, 'sh', 'sh', '-c', 'echo for nobody') or number)"
    )
    for closed in (">&-", ">&- 2>&-", "<&- >&-"):
        result = run_with(closed, program)
        assert result.returncode > 2 and result.stderr == "", result.stderr
    assert run_with("", program).returncode == 3, "nothing is held where nothing is closed"


COMMAND = """
import sys
from launch.runs import entry
def main():
    entry.parser("Bücher \u6f22").parse_args(["--help"])
sys.exit(entry.run(main, has_ranks=False))
"""


@pytest.mark.parametrize(
    ("stdout", "shell", "printed", "told"),
    [
        ("", "PYTHONIOENCODING=ascii ", "B\\xfccher \\u6f22", False),
        pytest.param("> /dev/full", "", "", False, marks=pytest.mark.slow),
        pytest.param("| head -c 0; exit ${PIPESTATUS[0]}", "", "", False, marks=pytest.mark.slow),
        pytest.param(">&-", "", "", True, marks=pytest.mark.slow),  # argparse then prints to stderr
        pytest.param("", "LC_ALL=C ", "Bücher \u6f22", False, marks=pytest.mark.slow),
    ],
)
def test_help_needs_no_terminal_of_a_kind(stdout: str, shell: str, printed: str, told: bool) -> None:
    """argparse prints past `say`, into a buffer that the interpreter would flush at its end."""
    result = run_with(stdout, COMMAND, shell=shell)
    assert result.returncode == 0 and printed in result.stdout, result
    assert result.stderr.startswith("usage: ") if told else result.stderr == ""


def test_a_command_whose_disk_is_full_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(error: Exception) -> int:
        def main() -> None:
            raise error

        return entry.run(main, has_ranks=False)

    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as met, path.open("wb", buffering=0) as file:
        file.write(b"x")
    assert end(met.value) == 2
    assert (
        capsys.readouterr().err
        == "error: No space left on device; make room and run the same command again\n"
    )
    assert end(OSError(errno.EDQUOT, "Disk quota exceeded", "a/b")) == 2
    assert capsys.readouterr().err.startswith("error: a/b: Disk quota exceeded; make room")
    with pytest.raises(FileNotFoundError):
        end(FileNotFoundError(errno.ENOENT, "No such file", "a/b"))
