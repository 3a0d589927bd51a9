"""Muon against AdamW on the quickstart's text-to-image: the same model, data, steps and ranks, scored by the judge.

Needs a finished `make quickstart`. All follow the quickstart's schedule; AdamW is given two peak rates.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from data.shards import Sample
from engine.loop import EXPORT
from evaluation import emoji_images
from evaluation.environment import machine, versions
from evaluation.judges.emoji import Judge
from evaluation.runner import evaluate
from evaluation.suites.emoji_t2i import EmojiT2ISuite
from generator.pipeline import Pipeline
from generator.sampling import SamplingConfig
from launch.steps import deepspeed

ROOT = Path("runs/quickstart")
STEPS = 600
NUM_IMAGES = 150
SAMPLING = SamplingConfig(num_steps=25, text_guidance=1.5, time_shift=6.0)
ADAMW = ("engine.optimizer.name=adamw", "engine.optimizer.grad_clip=1.0")
CASES: dict[str, Sequence[str]] = {
    "muon 0.04, adamw 2e-3 for the rest": (),
    "adamw 2e-3": ADAMW,
    "adamw 4e-3": (*ADAMW, "engine.optimizer.lr=4.0e-3"),
}


def main() -> None:
    """Prints one line a case."""
    print(
        f"machine: {machine()}\nversions: {versions()}\n{STEPS} steps on 2 ranks, {NUM_IMAGES} held-out captions"
    )
    judge = Judge.load(ROOT / "judge" / EXPORT)
    samples = emoji_images.read_samples(ROOT / "data/scenes-validation", NUM_IMAGES)
    for name, overrides in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, scores = train_and_score(Path(folder), overrides, judge, samples)
        right, found = scores["object_right"]["mean"], scores["objects_found"]["mean"]
        print(
            f"{name:36s} {seconds:5.0f} s  exact objects {right:.3f}  objects found {found:.3f}", flush=True
        )


def train_and_score(
    folder: Path, overrides: Sequence[str], judge: Judge, samples: Sequence[Sample]
) -> tuple[float, dict[str, dict[str, float]]]:
    """Seconds of the whole training command, and the scores of its drawings."""
    command = deepspeed(
        2,
        "launch/train_t2i.py",
        "--config",
        "configs/quickstart/t2i.yaml",
        f"run_dir={folder / 'run'}",
        f"engine.steps={STEPS}",
        "engine.wandb=disabled",
        *overrides,
    )
    begin_s = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - begin_s
    pipeline = Pipeline.load(folder / "run" / EXPORT, ROOT / "decoder" / EXPORT, ROOT / "text_tokenizer")
    emoji_images.drawings(samples, pipeline, SAMPLING, folder / "images")
    scores: dict[str, dict[str, float]] = evaluate(
        EmojiT2ISuite(judge), folder / "images", folder / "scores"
    )["scores"]
    return seconds, scores


if __name__ == "__main__":
    main()
