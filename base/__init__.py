"""Rules that every folder may import: configs, files, printing, and the interface of what is trained."""

import os
from pathlib import Path

# This must be set before anything loads OpenMP. By default OpenMP's threads spin while they wait for each other; beside
# a busy process that costs seventy times the work (2 threads on 2 cores, 200 small forward passes: 202 s; with sleeping
# threads 2.9 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FOLDERS = ("base", "data", "tokenizer", "generator", "evaluation", "report", "engine", "launch", "quickstart")
"""The source's folders, each a top-level package."""


def sources(repository: Path, *others: str) -> list[Path]:
    """Every Python file of FOLDERS, and of the folders `others`, below `repository`, sorted."""
    return sorted(path for folder in (*FOLDERS, *others) for path in (repository / folder).rglob("*.py"))
