"""Runs a chain of commands, each once: after a kill or a failure the next call continues at the missing step."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base import files
from base.config import UserError, resolve
from base.terminal import say
from engine.logs import seconds_text
from quickstart import chain_folder

NOISE = re.compile(r"^(\[\d{4}-|\[W\d|\[rank|W\d{4}|\s*$)|Warning|warn")
"""Log lines of libraries. They stay in the step's log file and are not shown."""
LINES_ON_FAILURE = 15


@dataclass(frozen=True)
class Step:
    """One step: a command line, or a function of this process. `inputs` are the configs (YAML) that it depends on."""

    name: str
    about: str
    work: Sequence[str] | Callable[[], None]
    inputs: tuple[str, ...] = ()
    settings: Any = None
    """Further JSON values that the step depends on."""


def run_steps(root: Path, steps: Sequence[Step]) -> None:
    """Runs the steps that are not done yet. Refuses if the command or inputs of a done step changed.

    Seconds of all runs of a step add up in durations.json. Raises UserError naming the step that failed.
    """
    done_before = ""
    for number, step in enumerate(steps, 1):
        marker = _marker(root, step.name)
        identity = files.digest([_command_text(step), *map(resolve, step.inputs), step.settings, done_before])
        done_before = identity
        state: dict[str, Any] = {"identity": identity, "seconds": 0.0, "done": False}
        if marker.exists():
            state = files.read_json(marker)
        title = f"[{number}/{len(steps)}] {step.name}: {step.about}"
        if state["identity"] != identity:
            raise UserError(
                f"{root}: step '{step.name}' was done with another config or input; use --fresh to start over"
            )
        if state["done"]:
            say(f"{title} - done ({seconds_text(state['seconds'])})")
            continue
        say(title)
        files.write_json(marker, state)
        begin_s = time.monotonic()
        try:
            with chain_folder.recorded(root, step.name):
                _work(step, root / "logs" / f"{step.name}.log")
            state["done"] = True
        finally:
            state["seconds"] += time.monotonic() - begin_s
            files.write_json(marker, state)
            write_durations(root, [done.name for done in steps])
        say(f"      {step.name} took {seconds_text(state['seconds'])}")


def write_durations(root: Path, names: Sequence[str]) -> None:
    """Writes durations.json: [{"name", "seconds"}] of the steps so far, in order."""
    markers = [(name, _marker(root, name)) for name in names]
    rows = [
        {"name": name, "seconds": files.read_json(path)["seconds"]} for name, path in markers if path.exists()
    ]
    files.write_json(root / "durations.json", rows)


def identity_of(root: Path, name: str) -> str:
    """What the step and all steps before it were done with, as a setting for steps elsewhere that build on it."""
    return str(files.read_json(_marker(root, name))["identity"])


def python(script: str, *arguments: str) -> list[str]:
    """Command line of an entry point in one process."""
    return [sys.executable, script, *arguments]


def deepspeed(num_ranks: int, script: str, *arguments: str) -> list[str]:
    """Command line of an entry point on `num_ranks` ranks of this machine."""
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or shutil.which("deepspeed")
    if launcher is None:
        raise UserError("deepspeed: no such command; install the package (make install)")
    return [launcher, "--num_gpus", str(num_ranks), script, *arguments]


def _marker(root: Path, name: str) -> Path:
    return root / "steps" / f"{name}.json"


def _work(step: Step, log_path: Path) -> None:
    if callable(step.work):
        step.work()
        return
    command = list(step.work)
    if Path(command[0]).name == "deepspeed":  # otherwise every run on this machine asks for port 29500
        from engine.distributed import free_port

        command[1:1] = ["--master_port", str(free_port())]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=LINES_ON_FAILURE)
    with log_path.open("a") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603  # steps.py's list, no shell
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            tail.append(line)
            if not NOISE.search(line):
                say(f"      {line}".rstrip("\n"))
    if process.wait() != 0:
        say("".join(tail).rstrip("\n"), sys.stderr)
        raise UserError(f"step '{step.name}' failed (exit {process.returncode}); its log is {log_path}")


def _command_text(step: Step) -> str:
    return step.name if callable(step.work) else " ".join([Path(step.work[0]).name, *step.work[1:]])
