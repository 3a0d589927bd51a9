"""What Slurm and Kubernetes start, with their commands played by small scripts: the trainings are real."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from base import config
from engine.distributed import free_port
from launch.runs import entry
from launch.runs.configs import GeneratorRun

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
END_S = 600  # limit of a hang
SRUN = f"""#!{sys.executable}
# Two tasks, each in a process group of its own as Slurm's are; the status is the highest of theirs.
import os, pathlib, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
tasks = []
for task in range(2):
    variables = os.environ | {{"SLURM_NODEID": str(task), "SLURM_PROCID": str(task)}}
    tasks.append(subprocess.Popen(command, env=variables, start_new_session=True))
pathlib.Path(os.environ["FAKE_PIDS"]).write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf '127.0.0.1\\nlocalhost\\n'; else echo "$@" >>"$FAKE_REQUEUES"; fi
"""
SBATCH = """#!/bin/sh
echo "$@" >>"$FAKE_JOBS"
wc -l <"$FAKE_JOBS"
"""


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with srun, scontrol and sbatch on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        executable(folder / name, text)
    files = {f"FAKE_{name}": str(tmp_path / name.lower()) for name in ("PIDS", "REQUEUES", "JOBS")}
    return os.environ | files | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "nodes[0-1]",
        "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SCRIPTS = [ROOT / "launch" / "node.sh", *sorted(SLURM.iterdir())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_bash_without_syntax_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_pass_shellcheck() -> None:
    result = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + END_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
def test_a_slurm_job_saves_on_its_signal_queues_again_and_goes_on(fakes, tiny_judge, tmp_path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [str(SLURM / "train.sbatch"), *tiny_judge(run_dir, "engine.checkpoint_every_steps=1000")]
    with log.open("wb") as output:
        job = subprocess.Popen(
            [*command, "engine.steps=2000"], cwd=ROOT, env=fakes, stdout=output, stderr=subprocess.STDOUT
        )
    until(lambda: num_steps(run_dir) >= 3, job, log)
    for pid in Path(fakes["FAKE_PIDS"]).read_text().split():
        os.killpg(int(pid), signal.SIGUSR1)  # to every process of the step: launcher, its child, the rank
    assert job.wait(END_S) == entry.STOPPED, log.read_text()
    assert Path(fakes["FAKE_REQUEUES"]).read_text().split() == ["requeue", fakes["SLURM_JOB_ID"]]
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))

    again = subprocess.run(
        [*command, f"engine.steps={step + 2}"],
        cwd=ROOT,
        env=fakes,
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumed at step {step}/{step + 2}" in again.stdout
    assert (run_dir / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_pod_that_is_told_to_end_saves_first(fakes, tiny_judge, tmp_path) -> None:
    """SIGTERM reaches the first process of a pod only: launch/node.sh."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = tiny_judge(run_dir, "engine.checkpoint_every_steps=1000", "engine.steps=2000")
    fakes["PATH"] = f"{Path(sys.executable).parent}:{fakes['PATH']}"
    with log.open("wb") as output:
        pod = subprocess.Popen(
            [str(ROOT / "launch" / "node.sh"), "0", "2", str(free_port()), "127.0.0.1", *arguments],
            cwd=ROOT, env=fakes, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    until(lambda: num_steps(run_dir) >= 3, pod, log)
    pod.terminate()
    assert pod.wait(END_S) == entry.STOPPED, log.read_text()
    assert len(list((run_dir / "checkpoints").glob("step_*"))) == 1


def test_the_slurm_chain_makes_every_job_wait_for_the_one_before(fakes) -> None:
    subprocess.run([str(SLURM / "pipeline.sh"), "2"], cwd=ROOT, env=fakes, check=True, capture_output=True)
    jobs = [line.split() for line in Path(fakes["FAKE_JOBS"]).read_text().splitlines()]
    assert not any(part.startswith("afterok") for part in jobs[0])
    for number, job in enumerate(jobs[1:], start=1):
        assert job[job.index("--dependency") + 1] == f"afterok:{number}"
    for job in jobs:
        script, program, config_file = job[-4], job[-3], job[-1]
        assert all((ROOT / path).is_file() for path in (script, program, config_file)), job


def test_an_array_of_jobs_shares_the_units_of_a_data_set(fakes, tmp_path) -> None:
    seen = tmp_path / "seen"
    executable(tmp_path / "bin" / "python", f'#!/bin/sh\necho "$@" >{seen}\n')
    fakes["VIRTUAL_ENV"] = str(tmp_path)
    fakes |= {"SLURM_CPUS_PER_TASK": "2", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}
    subprocess.run([str(SLURM / "make_shards.sbatch"), "cc12m", "--out", "x"], env=fakes, check=True)
    expected = "launch/make_shards.py cc12m --out x --processes 2 --node 3 --nodes 8"
    assert seen.read_text().strip() == expected


@pytest.fixture(scope="module")
def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    documents = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text())
    service, job = documents
    return service, job


def test_the_kubernetes_job_gives_each_pod_its_name_and_its_part(kubernetes) -> None:
    service, job = kubernetes
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    names = [
        f"{job['metadata']['name']}-{i}.{service['metadata']['name']}" for i in range(spec["completions"])
    ]
    assert arguments[3].split(",") == names and pod["subdomain"] == service["metadata"]["name"]
    assert arguments[1] == str(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    codes = {code: rule["action"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
             for code in rule["onExitCodes"]["values"]}  # fmt: skip
    assert codes == {2: "FailJob", entry.STOPPED: "Ignore", entry.LOST_CONTACT: "Ignore"}


def test_the_command_of_a_kubernetes_pod_starts_its_node(kubernetes, tmp_path) -> None:
    """`deepspeed` is a script that prints what it was given."""
    container = kubernetes[1]["spec"]["template"]["spec"]["containers"][0]
    command = [*container["command"], *container["args"]]
    command = [part.replace("$(JOB_COMPLETION_INDEX)", "1") for part in command]
    executable(tmp_path / "deepspeed", '#!/bin/sh\ncat "$2"\necho "$@"\n')
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True, start_new_session=True
    )
    *hosts, line = result.stdout.splitlines()
    assert hosts == [f"rpiae-train-{i}.rpiae-train slots=8" for i in range(2)]
    given = shlex.split(line)
    assert given[2:9] == shlex.split(
        "--no_ssh --node_rank 1 --master_addr rpiae-train-0.rpiae-train --master_port 29500"
    )
    assert not Path(given[1]).exists(), "the hostfile is removed"
    assert (ROOT / given[9]).is_file()
    config.load(GeneratorRun, ROOT / given[11], given[12:])
