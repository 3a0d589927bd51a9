"""Killed and started again on a GPU, bit for bit: what engine.deterministic promises."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.engine_config import EngineConfig
from tokenizer.weights import read_tensors

SCRIPT = Path(__file__).parent / "scripts" / "resumed_t2i.py"
REPOSITORY = Path(__file__).parents[2]
KILLED = -9

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the loop needs deepspeed"),
    pytest.mark.skipif(
        "deterministic" not in {field.name for field in dataclasses.fields(EngineConfig)},
        reason="this version has no engine.deterministic",
    ),
]


def train(run_dir: Path, kill_at: int = 0) -> int:
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(SCRIPT), str(run_dir), str(kill_at)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=120).returncode


def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """bf16, ZeRO-1, four packs a step: the whole run, and one that was killed after its second checkpoint."""
    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "killed", kill_at=5) == KILLED
    assert train(tmp_path / "killed") == 0
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert len(curves[0]) == 8 and curves[0] == curves[1]
    whole, killed = (
        read_tensors(tmp_path / name / "export" / "model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
