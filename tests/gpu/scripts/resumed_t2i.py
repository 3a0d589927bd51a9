"""A tiny deterministic text-to-image training: RUN_DIR KILL_AT (0: to its end). Killed before step KILL_AT begins."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base.objective import Batch
from benchmarks.throughput import CONFIG, packs
from engine import distributed
from engine.loop import train
from generator.model import Generator
from generator.objective import FlowObjective
from launch.runs.configs import GeneratorRun
from launch.runs.tasks import read_run
from launch.sizing.estimate import untrained_latents
from launch.sizing.synthetic import SyntheticText

LATENTS = (64, 16, 16)
OVERRIDES = (
    "engine.steps=8", "engine.checkpoint_every_steps=2", "engine.log_every_steps=1", "engine.wandb=disabled",
    "engine.deterministic=true", "engine.sample_every_steps=0", "engine.async_checkpoint=false",
    "generator.init=random", "generator.backbone.width=256", "generator.backbone.num_layers=4",
    "generator.backbone.num_heads=4", "generator.backbone.num_kv_heads=2", "generator.backbone.mlp_width=512",
    "generator.backbone.vocab_size=512",
)  # fmt: skip
NUM_PACKS = 4


class Ring:
    """Packs of step n by n alone, so that a resumed run meets those it would have met."""

    num_streams = NUM_PACKS

    def __init__(self, packs: Sequence[Batch], kill_at: int) -> None:
        self._packs, self._kill_at, self._step = packs, kill_at, 0

    def next_step(self) -> Sequence[Batch]:
        self._step += 1
        if self._step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return [self._packs[(self._step + i) % len(self._packs)] for i in range(NUM_PACKS)]

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": "ring", "streams": {"step": self._step}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["streams"]["step"]

    def metrics(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        pass


def main(run_dir: Path, kill_at: int) -> None:
    ranks = distributed.start()
    run = read_run(str(CONFIG), OVERRIDES)
    assert isinstance(run, GeneratorRun)
    text = SyntheticText(run.generator.backbone.vocab_size)
    model = Generator.create(run.generator, untrained_latents(LATENTS, text.fingerprint), run.engine.seed)
    objective = FlowObjective("t2i", model, run.flow, text, start="untrained")
    source = Ring(packs(LATENTS, 2048, 8, run.packing.max_side), kill_at)
    run_dir.mkdir(parents=True, exist_ok=True)
    train(objective, source, run.engine, run_dir=run_dir, resolved={}, ranks=ranks)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
