"""What a run says: one line for people, one JSON line for machines, wandb, and sample grids."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine import files

WandbMode = Literal["disabled", "offline", "online"]


def seconds_text(seconds: float) -> str:
    """`75 -> 1m15s`, `3700 -> 1h01m`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def say(text: str, stream: TextIO | None = None) -> None:
    """One line for people, at once (default: to stdout), or nothing where nobody can read it any more.

    A launcher that was stopped closes the pipe while its ranks still save: that must not be what ends them.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())


class RunLog:
    """Writes metrics.jsonl, sample grids and wandb of one run (rank 0 only).

    On resume, lines of steps that are done again are dropped, so that every step stands there once.
    """

    def __init__(
        self, run_dir: Path, name: str, config: Mapping[str, Any], start_step: int, wandb_mode: WandbMode
    ) -> None:
        self.run_dir = run_dir
        self.name = name
        self._metrics_path = run_dir / "metrics.jsonl"
        self._keep_before(start_step)
        self._metrics: TextIO = self._metrics_path.open("a")
        self._wandb = _start_wandb(run_dir, name, config, wandb_mode)

    def line(self, text: str) -> None:
        """One line for people, at once."""
        say(f"[{self.name}] {text}")

    def metrics(self, values: Mapping[str, float], num_steps: int, eta_s: float) -> None:
        """`values` must hold `step` (number of finished steps) and `loss`; a non-finite value is written as null."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=int(values["step"]))
        rates = [
            f"{values[key]:,.0f} {unit}"
            for key, unit in (("samples_per_s", "samples/s"), ("tokens_per_s", "tokens/s"))
            if values.get(key, 0.0) > 0 and (unit == "samples/s" or values["tokens"] > values["samples"])
        ]
        shown = [f"step {int(values['step'])}/{num_steps}", f"loss {values['loss']:.4f}"]
        shown += [f"lr {values['lr']:.2e}", f"grad {values['grad_norm']:.2f}", *rates]
        if "mfu" in values:
            shown.append(f"MFU {values['mfu']:.1%}")
        self.line(" | ".join([*shown, f"ETA {seconds_text(eta_s)}"]))

    def samples(self, step: int, grid: npt.NDArray[np.uint8]) -> None:
        """`grid` uint8 [H, W, 3] as samples/step_XXXXXXXX.png."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        temporary = folder / ".grid.tmp.png"
        Image.fromarray(grid).save(temporary)
        path = folder / f"step_{step:08d}.png"
        temporary.replace(path)
        if self._wandb is not None:
            import wandb

            self._wandb.log({"samples": wandb.Image(str(path))}, step=step)

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`: its successors are done again (wandb keeps its own)."""
        self._metrics.close()
        self._keep_before(step)
        self._metrics = self._metrics_path.open("a")

    def close(self) -> None:
        """Flushes everything."""
        self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_before(self, start_step: int) -> None:
        if not self._metrics_path.exists():
            return
        kept = []
        for line in self._metrics_path.read_text().splitlines():
            try:
                step = json.loads(line)["step"]
            except json.JSONDecodeError:  # the line a killed process was writing
                continue
            if step <= start_step:
                kept.append(line + "\n")
        files.write_text(self._metrics_path, "".join(kept))


def _start_wandb(run_dir: Path, name: str, config: Mapping[str, Any], mode: WandbMode) -> Any:
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # The id follows from the folder, so that a resumed run continues the same curve.
    identity = files.digest(str(run_dir.resolve()))[:16]
    return wandb.init(
        project="rpiae",
        name=name,
        id=identity,
        resume="allow",
        dir=str(run_dir),
        mode=mode,
        config=dict(config),
    )
