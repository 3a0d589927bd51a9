"""The size of each folder of the source: python -m benchmarks.tree [BEFORE [AFTER]], two commits.

Prints a row for each folder: Python files, their lines, and imports (pairs of a file and a module of this project that
the file names). AFTER is the working tree by default.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import base
from base import FOLDERS

ELSEWHERE = ("tests", "benchmarks")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Size:
    """Size of the Python files below one folder."""

    files: int = 0
    lines: int = 0
    imports: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.files + other.files, self.lines + other.lines, self.imports + other.imports)


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", nargs="?", default="HEAD", help="a commit (default: HEAD)")
    parser.add_argument("after", nargs="?", help="a commit (default: the working tree)")
    arguments = parser.parse_args()
    print(table(sizes(sources(arguments.before)), sizes(sources(arguments.after))))


def table(before: dict[str, Size], after: dict[str, Size]) -> str:
    """Both trees side by side, in Markdown: the folders of the source with their sum, then all others."""
    rows = ["| folder | files | lines | imports |", "|---|---|---|---|"]
    for name in (*FOLDERS, "sum", *ELSEWHERE):
        old, new = (
            sum((found.get(folder, Size()) for folder in FOLDERS), Size())
            if name == "sum"
            else found.get(name, Size())
            for found in (before, after)
        )
        cells = (f"{a:,} -> {b:,}" for a, b in zip(vars(old).values(), vars(new).values(), strict=True))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def sizes(texts: Iterable[tuple[str, str]]) -> dict[str, Size]:
    """(path, source) of Python files -> the size of each top folder."""
    found: dict[str, Size] = {}
    for path, text in texts:
        folder = path.partition("/")[0]
        found[folder] = found.get(folder, Size()) + Size(1, text.count("\n"), len(imported(text)))
    return found


def imported(text: str) -> set[str]:
    """Names of this project's modules that a file imports, at any level of indentation."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.partition(".")[0] in FOLDERS}


def sources(commit: str | None) -> Iterator[tuple[str, str]]:
    """Path and text of every Python file in the folders at `commit`; None: in the working tree."""
    if commit is None:
        for file in base.sources(ROOT, *ELSEWHERE):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        return
    for path in _git("ls-tree", "-r", "--name-only", commit).splitlines():
        if path.endswith(".py") and path.partition("/")[0] in (*FOLDERS, *ELSEWHERE):
            yield path, _git("show", f"{commit}:{path}")


def _git(*arguments: str) -> str:
    return subprocess.run(  # noqa: S603 - git, on paths of this repository
        ["git", "-C", str(ROOT), *arguments],  # noqa: S607 - the git of whoever runs it
        capture_output=True,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    main()
