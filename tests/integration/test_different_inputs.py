"""Two ranks, two hosts' worth of files at one path: refused at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.distributed import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_with_different_data_at_one_path_do_not_train(tmp_path, emoji_shards, tiny_judge) -> None:
    """Each rank has a working directory of its own, so that one relative path leads to two folders."""
    script, _, config, *overrides = tiny_judge(tmp_path / "run", "data.shards=pixels", "engine.steps=2")
    emoji_shards(tmp_path / "0" / "pixels", "scenes-train", 40)
    emoji_shards(tmp_path / "1" / "pixels", "scenes-train", 44)
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), "--config", str(ROOT / config), *overrides],
            cwd=tmp_path / str(rank),
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = "".join(process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "(rank 1): data shards (pixels) 44 samples, fingerprint " in line and " has 40 samples" in line, (
        line
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
