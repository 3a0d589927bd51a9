"""A run's logs: console lines, JSON lines of metrics, scores and events, wandb, and sample grids."""

from __future__ import annotations

import contextlib
import io
import json
import math
import netrc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from base import files
from base.config import UserError
from base.redaction import redact, redacted
from base.terminal import say
from engine.engine_config import WandbMode
from engine.log_files import Expendable, JsonLines

METRICS, SCORES, EVENTS, SAMPLES = "metrics.jsonl", "scores.jsonl", "events.jsonl", "samples"
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
WANDB_HOST = "api.wandb.ai"
WANDB_FINISH_S = 300.0
"""How long the end of a run waits for wandb's upload. wandb's default waits until the server answers."""
EventKind = Literal[
    "start",
    "resume",
    "change",
    "checkpoint",
    "evaluation",
    "warning",
    "alarm",
    "nonfinite",
    "spike",
    "roll_back",
    "stop",
    "error",
    "finish",
]


def seconds_text(seconds: float) -> str:
    """`75 -> 1m15s`, `3700 -> 1h01m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class RunLog:
    """Writes metrics.jsonl, scores.jsonl, events.jsonl, sample grids and wandb of one run (rank 0 only).

    Secrets are masked. On resume, metrics and scores of steps that are repeated are dropped, so that every step has one
    line; all events stay. A write that fails while the training goes on is reported once a file.
    """

    def __init__(
        self, run_dir: Path, name: str, config: Mapping[str, Any], start_step: int, wandb_mode: WandbMode
    ) -> None:
        self.run_dir = run_dir
        self.name = name
        self._spare = Expendable(self.line)
        self._keep_before(start_step)
        (run_dir / METRICS).touch()
        self._files = {name: JsonLines(run_dir / name) for name in (METRICS, SCORES, EVENTS)}
        self._console = Console()
        self._config, self._wandb_mode = redacted(config), wandb_mode
        self._wandb: Any = None
        self._open_wandb(start_step)

    def line(self, text: str) -> None:
        """Prints one line for people, at once."""
        say(f"[{self.name}] {redact(text)}")

    def event(self, kind: EventKind, step: int, text: str) -> None:
        """Appends an event after `step` finished steps to events.jsonl, with the time (unix, s)."""
        row = {"time_s": time.time(), "step": step, "kind": kind, "text": redact(text)}
        self._append(EVENTS, row)

    def ended_by(self, error: BaseException, step: int) -> None:
        """Records what ended the run at `step`: the sentence of a UserError or a stop, else the exception."""
        with contextlib.suppress(OSError):  # a full disk must not hide the reason
            if isinstance(error, UserError):
                self.event("stop", step, str(error))
            else:
                self.event("error", step, f"{type(error).__name__}: {error}")

    def metrics(self, values: Mapping[str, float], num_steps: int, eta_s: float) -> None:
        """Logs `values`, which must hold `step` (finished steps) and `loss`; a non-finite value is written as null.

        Adds `time_s` (unix, s) and `num_steps`, the steps of the whole run.
        """
        row = {**_finite(values), "time_s": time.time(), "num_steps": num_steps}
        self._append(METRICS, row)
        self._tell_wandb(int(values["step"]), lambda: dict(values))
        self.line(self._console.text(values, num_steps, eta_s))

    def samples(self, step: int, grid: npt.NDArray[np.uint8]) -> None:
        """Writes `grid`, uint8 [H, W, 3], to samples/step_XXXXXXXX.png."""
        path = self.run_dir / SAMPLES / f"step_{step:08d}.png"
        with self._spare(SAMPLES):
            path.parent.mkdir(exist_ok=True)
            image = io.BytesIO()
            Image.fromarray(grid).save(image, "png")
            files.write_bytes(path, image.getvalue())
            self._tell_wandb(step, lambda: {"samples": _wandb_image(path)})

    def scores(self, step: int, values: Mapping[str, float]) -> None:
        """Appends an evaluation's scores to scores.jsonl: one line of `step`, `time_s` (unix, s) and the scores."""
        row = {"step": step, "time_s": time.time(), **_finite(values)}
        self._append(SCORES, row)
        self._tell_wandb(step, lambda: {f"evaluation/{name}": value for name, value in values.items()})

    def has_scores(self, step: int) -> bool:
        """Whether scores.jsonl holds the scores of that step."""
        path = self.run_dir / SCORES
        return path.exists() and any(
            json.loads(line)["step"] == step for line in path.read_text().splitlines()
        )

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, because those steps are repeated. wandb keeps its lines."""
        with self._spare(METRICS):
            self._keep_before(step)

    def close(self) -> None:
        """Closes every file and ends wandb's run."""
        for file in self._files.values():
            file.close()
        if self._wandb is not None:
            with contextlib.suppress(Exception):  # what was not uploaded stays in the run folder
                self._wandb.finish()

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with self._spare(name):
            self._files[name].append(row)

    def _open_wandb(self, step: int) -> None:
        try:
            self._wandb = _start_wandb(self.run_dir, self.name, self._config, self._wandb_mode)
        except Exception as error:
            self._leave_wandb(error, step)

    def _tell_wandb(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        if self._wandb is None:
            return
        try:
            self._wandb.log(values(), step=step)
        except Exception as error:
            self._leave_wandb(error, step)
            self._tell_wandb(step, values)

    def _leave_wandb(self, error: Exception, step: int) -> None:
        """A wandb error does not end the training: wandb goes on offline, or, if that fails too, not at all."""
        self._wandb_mode = "offline" if self._wandb_mode == "online" else "disabled"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        text = f"WARNING: wandb failed ({reason}); this run goes on with engine.wandb={self._wandb_mode}"
        self.line(text)
        self.event("warning", step, text)
        with contextlib.suppress(Exception):  # of a run that is broken already
            import wandb

            wandb.teardown()
        self._wandb = None
        self._open_wandb(step)

    def _keep_before(self, start_step: int) -> None:
        for path in (self.run_dir / METRICS, self.run_dir / SCORES):
            if path.exists():
                files.write_text(path, "".join(_lines_before(path, start_step)))


class Console:
    """Formats the line of a log interval. Numbers keep the greatest width so far, so that lines form columns."""

    def __init__(self) -> None:
        self._widths: dict[str, int] = {}

    def text(self, values: Mapping[str, float], num_steps: int, eta_s: float) -> str:
        """Step, loss, rates and remaining time; numbers that a run does not have are left out."""
        cells = [
            self._cell("step ", f"{int(values['step'])}/{num_steps}", "", len(str(num_steps)) * 2 + 1),
            self._cell("loss ", f"{values['loss']:.4f}", "", 7),
            self._cell("lr ", f"{values['lr']:.2e}"),
            self._cell("grad ", f"{values['grad_norm']:.2f}", "", 6),
        ]
        for key, unit in (("samples_per_s", "samples/s"), ("tokens_per_s", "tokens/s")):
            rate = values.get(key, 0.0)
            if rate > 0 and (unit == "samples/s" or values["tokens"] > values["samples"]):
                cells.append(self._cell("", f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}", f" {unit}", 7))
        if "mfu" in values:
            cells.append(self._cell("MFU ", f"{values['mfu']:.1%}", "", 5))
        return " | ".join([*cells, self._cell("ETA ", seconds_text(eta_s), "", 6)])

    def _cell(self, before: str, number: str, after: str = "", width: int = 0) -> str:
        name = before + after
        self._widths[name] = max(self._widths.get(name, width), len(number))
        return f"{before}{number:>{self._widths[name]}}{after}"


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """`values` with None for nan and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _lines_before(path: Path, start_step: int) -> Iterator[str]:
    """The lines of steps up to `start_step`."""
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:  # the half line of a killed process
            continue
        if step <= start_step:
            yield line + "\n"


def check_wandb(mode: WandbMode) -> None:
    """Raises UserError: `mode` is online and nobody is logged in to wandb here. Asks no server."""
    if mode != "online" or any(os.environ.get(name) for name in WANDB_KEYS):
        return
    import wandb

    host = urlsplit(str(wandb.setup().settings.base_url)).hostname
    paths = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    for path in (Path(path).expanduser() for path in paths if path):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if {host, WANDB_HOST} & netrc.netrc(path).hosts.keys():
                return
    raise UserError(
        "engine.wandb=online: no key of wandb on this machine; run `wandb login`, set WANDB_API_KEY, or set "
        "engine.wandb=offline"
    )


def _start_wandb(run_dir: Path, name: str, config: Mapping[str, Any], mode: WandbMode) -> Any:
    if mode == "disabled":
        return None
    import wandb

    # The id follows from the folder, so that a resumed run continues the same curve.
    identity = files.digest(str(run_dir.resolve()))[:16]
    # wandb's metadata would hold the command line, which may contain a secret; its console log would be a second one.
    settings = wandb.Settings(
        silent=True, console="off", x_disable_meta=True, disable_git=True, disable_code=True
    )
    if hasattr(settings, "finish_timeout"):
        settings.finish_timeout = WANDB_FINISH_S
    return wandb.init(
        project="rpiae",
        name=name,
        id=identity,
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        config=dict(config),
        settings=settings,
    )


def _wandb_image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))
