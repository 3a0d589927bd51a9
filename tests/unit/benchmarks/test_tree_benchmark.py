"""The table of the source's size counts what it says: files, lines, and modules of this project that are named."""

from base import FOLDERS as PACKAGES
from benchmarks.tree import FOLDERS, Size, imported, sizes, sources, table

TEXT = """import torch
from base.config import UserError, load
from data.shards import ShardDataset


def later() -> None:
    import data.plan.plan
    from base.config import dump
"""


def test_a_module_counts_once_a_file_wherever_it_is_imported() -> None:
    assert imported(TEXT) == {"base.config", "data.shards", "data.plan.plan"}


def test_folders_are_summed_below_the_source_and_beside_it() -> None:
    found = sizes([("data/a.py", TEXT), ("data/plan/b.py", "x = 1\n"), ("tests/unit/c.py", TEXT)])
    assert found == {"data": Size(2, 9, 3), "tests": Size(1, 8, 3)}
    rows = table({}, found).splitlines()
    assert "| data | 0 -> 2 | 0 -> 9 | 0 -> 3 |" in rows
    assert "| sum | 0 -> 2 | 0 -> 9 | 0 -> 3 |" in rows and "| tests | 0 -> 1 | 0 -> 8 | 0 -> 3 |" in rows


def test_every_package_has_its_row_and_the_working_tree_its_files() -> None:
    assert FOLDERS == PACKAGES
    paths = {path for path, _ in sources(None)}
    assert {"base/config.py", "benchmarks/tree.py"} <= paths
