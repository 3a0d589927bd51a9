"""Commands of launch/ and quickstart/ in processes of their own, and what they leave; or in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.distributed import free_port
from launch.runs import entry

ROOT = Path(__file__).parents[2]


def on_ranks(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    """The words that start launch/SCRIPT.py; on several ranks by DeepSpeed's launcher."""
    words = [str(ROOT / "launch" / f"{script}.py"), *arguments]
    if ranks == 1:
        return [sys.executable, *words]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), *words]


def finish(words: list[str], status: int = 0) -> str:
    """Runs to the end; returns what was printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


def curve(run_dir: Path) -> list[float]:
    """The losses of a run's log."""
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def in_process(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: object,
    main: Callable[[], None],
) -> tuple[int, str, str]:
    """Runs the `main` of a command in this process; returns its exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
    try:
        status = entry.run(main)
    except SystemExit as stopped:  # by argparse
        assert isinstance(stopped.code, int)
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
