"""Seconds and memory of commands before they begin their work: python -m benchmarks.start_up [--before COMMIT]

Every command runs in a process of its own, with the files in the page cache. With --before the commit's commands take
turns with the working tree's, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = 'from evaluation.environment import machine, versions; print(f"machine: {machine()}\\nversions: {versions()}")'
"""Run in a process of its own: a child's peak of memory counts what its parent holds, so this one stays small."""
COMMANDS = {
    **{
        f"{script} --help": ([f"{script}.py", "--help"], 0)
        for script in (
            *("launch/sample", "launch/train_t2i", "launch/train_tokenizer", "launch/evaluate"),
            *("launch/make_shards", "quickstart/chain"),
        )
    },
    "a mistyped key of launch/train_t2i": (["launch/train_t2i.py", "engine.stepz=3"], 2),
    "launch/train_t2i --dry-run": (["launch/train_t2i.py", "--dry-run"], 0),
}
"""What is measured: the script with its words, and the exit status that it must have."""


@dataclass(frozen=True)
class Cost:
    """What one run of a command took."""

    seconds: float
    peak_mib: float


def main() -> None:
    """Prints a line for each command: medians of the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="COMMIT", help="also measure the commands of this commit")
    parser.add_argument("--runs", type=int, default=7, help="of each command (default 7)")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "-c", HEADER], cwd=ROOT, check=True)  # noqa: S603 - the line above
    print(f"medians of {arguments.runs} runs", flush=True)
    with contextlib.ExitStack() as stack:
        trees = {"": ROOT}
        if arguments.before is not None:
            trees = {"before": stack.enter_context(checked_out(arguments.before)), "after": ROOT}
        for name, (words, status) in COMMANDS.items():
            costs: dict[str, list[Cost]] = {label: [] for label in trees}
            for number in range(arguments.runs + 1):
                for label, tree in trees.items():
                    cost = measure(tree, words, status)
                    if number:  # the first run fills the page cache
                        costs[label].append(cost)
            print(f"{name:38s}" + "; ".join(text(label, runs) for label, runs in costs.items()), flush=True)


def text(label: str, runs: list[Cost]) -> str:
    """`after  0.15 s,    25 MiB`, the medians of the runs."""
    seconds, peak_mib = (
        statistics.median(values)
        for values in zip(*((run.seconds, run.peak_mib) for run in runs), strict=True)
    )
    return f"{label and f'{label} '}{seconds:6.2f} s, {peak_mib:6,.0f} MiB"


def measure(tree: Path, words: list[str], status: int) -> Cost:
    """Runs one command of the source in `tree`. Raises RuntimeError: it ended with another status than `status`."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    begin_s = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - a command of this repository
        [sys.executable, *words],
        cwd=tree,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, found, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin_s
    process.returncode = os.waitstatus_to_exitcode(found)
    if process.returncode != status:
        raise RuntimeError(f"{' '.join(words)} in {tree}: status {process.returncode}, not {status}")
    return Cost(seconds, usage.ru_maxrss / 1024)


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary folder with the files of `commit`."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
    archive = subprocess.run(command, capture_output=True, check=True).stdout  # noqa: S603 - git's own name
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder).resolve()


if __name__ == "__main__":
    main()
