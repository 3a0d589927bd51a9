"""The gradient that the optimizer sees on one GPU, over NCCL, is the mean over the packs: as in test_gradients.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.distributed import free_port
from integration import test_gradients

INTEGRATION = Path(__file__).parents[1] / "integration"
PRECISIONS = ("fp32", "bf16_autocast", "bf16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_precision_and_stage_sums_its_packs_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    cases = [f"{precision}:{zero}:4:30" for precision in PRECISIONS for zero in (1, 2, 3)]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, str(INTEGRATION / "scripts" / "gradients.py"), "--root", str(tmp_path), *cases],
        env=os.environ | alone | {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(INTEGRATION.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    compare = test_gradients.assert_case
    for case in cases:
        compare(case, torch.load(tmp_path / f"{case}:1.pt", weights_only=False), on_cpu=False)
