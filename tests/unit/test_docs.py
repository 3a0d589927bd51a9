"""README and docs/ say what is there: commands parse, configs and keys exist, links resolve, numbers have a source."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from deepspeed.launcher.runner import parse_args as parse_launcher

from base import FOLDERS, sources
from launch.runs import entry
from launch.runs.tasks import read_run
from launch.sizing import dry_run

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")],
    key=lambda path: path.as_posix(),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
ASSIGNMENT = re.compile(r"\b([A-Z])=(\"[^\"]*\"|[^\s`]+)")
MAX_README_LINES = 150


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose_of(path: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(path))


# Commands


@dataclass(frozen=True)
class Command:
    """One command of a page, its variables filled in."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


@functools.cache
def commands_of(page: Path) -> tuple[Command, ...]:
    return tuple(command for command in _read_commands(page) if command.words)


def all_commands() -> list[Command]:
    return [command for page in PAGES for command in commands_of(page)]


def _read_commands(page: Path) -> Iterator[Command]:
    """Fenced commands in reading order, and those that prose names as `make ...` or `python -m ...`."""
    text, variables = text_of(page), {}
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$|`([A-Z]=[^`\n]+)`", text, re.MULTILINE | re.DOTALL):
        language, block, assignment = found.groups()
        lines = (
            [assignment] if assignment else (block.replace("\\\n", " ").splitlines() if not language else [])
        )
        for line in lines:
            if re.match(r"[A-Z]=", line):
                variables |= {name: value.strip('"') for name, value in ASSIGNMENT.findall(line)}
                continue
            for name, value in variables.items():
                line = line.replace(f"${{{name}}}", value).replace(f"${name}", value)
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
            yield Command(name_of(page), tuple(word for word in words if word != "..."))
    for inline in INLINE.findall(prose_of(page)):
        if inline.startswith(("make ", "python -m ")):
            yield Command(name_of(page), tuple(word for word in inline.split() if word != "..."))


PROGRAMS = ("python", "deepspeed", "sbatch")


class Parsed(Exception):  # noqa: N818 - no error: it ends main() where the command line has been read
    """What argparse made of a command."""


def target_of(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """Module and arguments of a command that runs python."""
    if words[0] == "deepspeed":
        launcher = parse_launcher(list(words[1:]))  # the launcher's own: it exits on an unknown option
        script, arguments = launcher.user_script, launcher.user_args
    elif words[0] == "sbatch":
        place = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
        script, arguments = words[place + 1], list(words[place + 2 :])
    elif words[1] == "-m":
        return words[2], list(words[3:])
    else:
        script, arguments = words[1], list(words[2:])
    assert (ROOT / script).is_file(), f"no script {script}"
    return script.removesuffix(".py").replace("/", "."), arguments


def without_placeholder_config(arguments: list[str]) -> list[str]:
    """`--config FILE` is the reader's own: the command's default is read in its place."""
    for place, word in enumerate(arguments[:-1]):
        if word == "--config" and not arguments[place + 1].endswith(".yaml"):
            return arguments[:place] + arguments[place + 2 :]
    return arguments


def parse(module_name: str, arguments: list[str]) -> argparse.Namespace | None:
    """Runs the command's own main() as far as it has read its command line and, with overrides, its config.

    None: it takes no options and none are given. Raises AssertionError with argparse's message.
    """
    module = importlib.import_module(module_name)
    source = Path(module.__file__ or "").read_text()
    assert "__main__" in source, f"{module_name} is no command"
    reads_config = any(name in source for name in ("read_config", "run_further", "tasks.main"))
    if "parse_" not in source and not reads_config:
        assert not arguments, f"{module_name} takes no options"
        return None

    def stop(parser: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        namespace, rest = parser.parse_known_intermixed_args() if intermixed else parser.parse_known_args()
        assert not rest, f"unrecognized: {rest}"
        if reads_config:
            return namespace
        raise Parsed(namespace)

    def read(cls: type, namespace: argparse.Namespace) -> object:
        raise Parsed(namespace, real_read(cls, namespace))

    def report(run: object) -> str:
        raise Parsed(argparse.Namespace(run=run))

    intermixed, real_read = "parse_intermixed_args" in source, entry.read_config
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        given = without_placeholder_config(arguments) if reads_config else arguments
        given = [*given, "--dry-run"] if "tasks.main" in source else given
        patch.setattr(dry_run, "report", report)
        patch.setattr(sys, "argv", [module_name, *given])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
        patch.setattr(entry, "read_config", read)
        patch.chdir(ROOT)
        try:
            module.main()
        except Parsed as parsed:
            namespace: argparse.Namespace = parsed.args[0]
            return namespace
        except SystemExit:
            pytest.fail(err.getvalue())
    pytest.fail(f"{module_name} ran to its end")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse_and_name_configs_and_keys_that_exist(page: Path) -> None:
    for command in commands_of(page):
        if command.words[0] not in PROGRAMS or command.words[1:] == ():
            continue
        try:
            module_name, arguments = target_of(command.words)
            if module_name.partition(".")[0] not in (*FOLDERS, "benchmarks"):
                continue
            namespace = parse(module_name, arguments)
            if module_name == "launch.preflight":
                words = [*namespace.config, *namespace.words]
                if words[0].endswith(".yaml"):
                    files = [ROOT / word for word in words if "=" not in word]
                    read_run(files, [word for word in words if "=" in word])
            for word in command.words:
                assert not word.startswith("configs/") or (ROOT / word).exists(), f"no {word}"
        except (AssertionError, ValueError, pytest.fail.Exception) as error:
            pytest.fail(f"{command}\n{error}")


def test_the_pages_hold_commands_of_every_kind() -> None:
    """The test above would pass on pages that it cannot read."""
    modules = {target_of(c.words)[0] for c in all_commands() if c.words[0] in PROGRAMS and len(c.words) > 1}
    assert {
        *("launch.make_shards", "launch.train_tokenizer", "launch.encode_latents", "launch.train_t2i"),
        *("launch.train_edit", "launch.sample", "launch.evaluate", "launch.preflight", "launch.train_class"),
        *(
            "launch.export",
            "launch.watch",
            "quickstart.make_data",
            "quickstart.readme_picture",
            "benchmarks.data",
        ),
    } <= modules
    assert sum(command.words[0] in PROGRAMS for command in all_commands()) > 80


@pytest.mark.parametrize(
    ("module_name", "arguments", "message"),
    [
        ("launch.train_t2i", ["--confg", "a"], "unrecognized"),
        ("launch.train_t2i", ["engine.stepps=3"], "did you mean 'engine.steps'"),
        ("launch.train_t2i", ["--config", "configs/none.yaml"], "no such config file"),
        ("launch.train_t2i", ["--config", "configs/tokenizer/pivot.yaml"], "task is tokenizer"),
        ("launch.make_shards", ["folders", "--images", "a"], "invalid choice"),
        ("launch.sample", ["--prompt", "a"], "required: --run"),
        ("benchmarks.data", ["--fast"], "takes no options"),
    ],
)
def test_a_command_that_is_wrong_would_be_noticed(module_name, arguments, message) -> None:
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception), match=message):
        parse(module_name, arguments)


def test_make_targets_and_files_of_schedulers_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in all_commands():
        if command.words[0] == "make":
            assert command.words[1] in targets, str(command)
        if command.words[0] in ("sbatch", "kubectl"):
            files = [word for word in command.words if word.startswith("launch/")]
            assert files and all((ROOT / file).is_file() for file in files), str(command)


def test_every_make_target_has_its_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^([a-z-]+):[^#\n]*## ", text, re.MULTILINE)) == set(phony[1].split())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_and_yaml_of_a_page_are_whole(page: Path) -> None:
    for language, block in FENCE.findall(text_of(page)):
        if language == "python":
            ast.parse(block)
        if language == "yaml":
            assert isinstance(yaml.safe_load(block), dict)
        assert language in ("", "python", "yaml", "math"), f"a block of {language} that nothing checks"


# Links, names


def slug(heading: str) -> str:
    """A heading's anchor on a code host: lower case, no punctuation, a hyphen for each blank."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{name_of(page)}: no {target}"
        assert not anchor or anchor in anchors(path), f"{name_of(page)}: no heading for {target}"


def test_every_page_of_docs_is_found_from_the_readme() -> None:
    found, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        found.add(page)
        linked = {
            (page.parent / name).resolve() for name in re.findall(r"\]\(([^)\s#]+\.md)", prose_of(page))
        }
        open_pages += [path for path in linked if path.is_file() and path not in found]
    assert not {*(ROOT / "docs").rglob("*.md")} - found


@functools.cache
def tree() -> tuple[str, ...]:
    folders = (*FOLDERS, "tests", "benchmarks", "configs", "docs", ".ci")
    return tuple(f"/{name_of(path)}" for folder in folders for path in (ROOT / folder).rglob("*"))


@functools.cache
def names_of_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for file in files for name in re.findall(r"def (test_\w+)\(", text_of(file)))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    for code in INLINE.findall(prose_of(page)):
        for name in re.findall(r"(?<![\w.*{/])[\w/]+\.(?:py|sh|sbatch)\b", code):
            assert any(path.endswith(f"/{name}") for path in tree()), f"no file {name}"
        if re.fullmatch(r"test_\w+", code):
            assert code in names_of_tests(), f"no test {code}"


# Numbers, length, messages


def sections(text: str) -> Iterator[str]:
    """A page's parts from heading to heading; the part before the second one goes with all."""
    head, *rest = re.split(r"^(?=##+ )", text, flags=re.MULTILINE)
    yield from (head, *rest)


def is_of_numbers(table: list[str]) -> bool:
    """Whether half of a table's cells behind the first column begin with a number."""
    cells = [cell.strip(" *~") for row in table[2:] for cell in row.strip("|").split("|")[1:]]
    return bool(cells) and sum(bool(re.match(r"[+-]?\d", cell)) for cell in cells) * 2 >= len(cells)


SOURCE = re.compile(
    r"\d{4}-\d{2}-\d{2}|`[^`]*\b(?:make|python|deepspeed) [^`]+`|preflight\.py|Tables? \d|Section \d"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_table_of_numbers_names_its_command_its_date_or_the_papers_place(page: Path) -> None:
    head = ""
    for number, part in enumerate(sections(prose_of(page))):
        head = part if number == 0 else head
        tables = re.findall(r"(?:^\|.*\n?)+", part, re.MULTILINE)
        around = head + part
        for table in map(str.splitlines, tables):
            if len(table) > 2 and is_of_numbers(table):
                without = around
                for row in table:
                    without = without.replace(row, "")
                assert SOURCE.search(without), f"{name_of(page)}: {table[0]}"


def test_the_readme_is_short() -> None:
    assert text_of(ROOT / "README.md").count("\n") <= MAX_README_LINES


@functools.cache
def literals() -> str:
    """All texts that stand in the source, pieces of f-strings among them."""
    found = set()
    for path in sources(ROOT):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return "\n".join(found)


def messages() -> list[str]:
    page = text_of(ROOT / "docs/troubleshooting.md")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_a_message_of_troubleshooting_is_one_that_the_source_has(message: str) -> None:
    pieces = [piece.strip(" ();':,") for piece in message.split("...")]
    for piece in filter(None, pieces):
        assert piece in literals(), f"nothing says '{piece}'"


def test_troubleshooting_has_what_people_meet_first() -> None:
    assert len(messages()) >= 25
