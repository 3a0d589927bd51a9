"""A run folder whose name is full of shell characters, through the launcher and all that it starts."""

import os
import subprocess
import sys
from pathlib import Path

from engine.distributed import free_port
from report.watch import read_run

SCRIPT = Path(__file__).parent / "scripts" / "toy_train.py"
HOSTILE = "a b; touch ran & $(touch ran) `touch ran` | touch ran > ran ' \" \\ *"


def test_the_deepspeed_launcher_executes_nothing_of_a_path(tmp_path: Path) -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ["--num_gpus", "2", "--master_port", str(free_port())]
    command = [str(launcher), *options, str(SCRIPT), "--run", HOSTILE, "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [HOSTILE]
    run = read_run(tmp_path / HOSTILE)
    assert run.step == 2 and run.events[-1].kind == "finish"
