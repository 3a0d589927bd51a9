"""Every process computes with its share of the cores that are there, and waits for its own threads asleep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base import FOLDERS, threads
from launch.runs import entry

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path
    for folder in ("launch", "quickstart")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


def test_a_containers_limit_counts_as_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert threads.num_cores(tmp_path) == 6
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.num_cores(tmp_path) == 6
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert threads.num_cores(tmp_path) == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert threads.num_cores(tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1\n", 6), ("300000\n", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert threads.num_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("local_ranks", "given", "expected"), [("1", None, 6), ("4", None, 1), ("2", "5", 7)]
)
def test_an_entry_point_shares_the_cores_among_its_ranks(
    local_ranks: str, given: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What OMP_NUM_THREADS says was set when torch was imported, and stands."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(threads, "CGROUP", Path("/nowhere"))
    monkeypatch.setenv("LOCAL_SIZE", local_ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(7)

    def command() -> None:
        entry.use_torch()
        seen.append(torch.get_num_threads())

    try:
        assert entry.run(command) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [expected]


def test_every_command_starts_through_the_entry_point() -> None:
    assert len(SCRIPTS) > 20
    assert [path.name for path in SCRIPTS if "sys.exit(entry.run(main" not in path.read_text()] == []


def test_every_command_says_how_threads_wait_before_it_loads_them() -> None:
    """libgomp reads its environment once; torch, numpy and scipy load it or another OpenMP."""
    program = (
        f"FOLDERS = {FOLDERS!r}"
        + """
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "scipy"):
            raise KeyboardInterrupt(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
for script in sys.argv[1:]:
    os.environ.pop("OMP_WAIT_POLICY", None)
    for name in [name for name in sys.modules if name.split(".")[0] in FOLDERS]:
        del sys.modules[name]
    try:
        runpy.run_path(script, run_name="imported")
        print(script, os.environ.get("OMP_WAIT_POLICY"))
    except KeyboardInterrupt as reached:
        print(script, reached)
"""
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    paths = [str(path) for path in SCRIPTS]
    result = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{path} PASSIVE" for path in paths]
