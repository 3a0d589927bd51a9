"""The distribution `rpiae` holds every module of the source, and git none that it ignores."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from setuptools import find_packages

from base import FOLDERS, sources

ROOT = Path(__file__).parents[2]


def source_folders() -> set[str]:
    return {".".join(path.parent.relative_to(ROOT).parts) for path in sources(ROOT)}


def test_every_folder_of_source_is_a_package_that_is_installed() -> None:
    include = [f"{name}*" for name in FOLDERS]  # as in setup.py
    assert set(find_packages(ROOT, include=include)) == source_folders()


def test_no_source_is_ignored_by_git() -> None:
    """`runs/` for the folder of results once hid launch/runs, too."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    paths = [str(path.relative_to(ROOT)) for path in sources(ROOT)]
    asked = ["git", "check-ignore", "--no-index", *paths]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout == ""
