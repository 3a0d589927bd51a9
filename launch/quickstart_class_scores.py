"""The last step of `make quickstart-class`: every export of every training on the same classes, as one page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import files
from engine.loop import EXPORT
from evaluation import emoji_images
from evaluation.class_set import ClassSetConfig, draw_class_set
from evaluation.environment import machine
from evaluation.features.representation import RepresentationFeatures
from evaluation.judges.emoji import Judge
from evaluation.manifest import ImageSet
from evaluation.metrics.interval import Estimate
from evaluation.report.class_page import LABELS, Point, Reference, page
from evaluation.runner import evaluate
from evaluation.suites.emoji_class import EmojiClassSuite
from generator.class_conditional.sampling import ClassSamplingConfig
from tokenizer.autoencoders import load_autoencoder


@dataclass(frozen=True)
class ScoresConfig:
    """How much is drawn, and how."""

    num_images: int = 440
    """Images drawn with each export."""
    sampling: ClassSamplingConfig = field(default_factory=ClassSamplingConfig)


def score(root: Path, base: Path, config: ScoresConfig, out: Path) -> None:
    """Draws and judges; reconstructions of real images as the mark; the page."""
    images = root / "evaluation" / "images"
    samples = emoji_images.read_samples(root / "data/classes-validation", 1 << 30)
    autoencoders = {name: files.read_json(root / name / "config.json")["autoencoder"] for name in LABELS}
    image_px = load_autoencoder(autoencoders["rpiae"]).config.image_px
    emoji_images.real_renders(samples, images / "real", image_px)
    judge, features = (
        Judge.load(base / "judge" / EXPORT),
        RepresentationFeatures.load(root / "features" / EXPORT),
    )
    suite = EmojiClassSuite(judge, features, ImageSet.open(images / "real"))

    def scored(name: str) -> tuple[float, Estimate]:
        found: dict[str, Any] = evaluate(suite, images / name, root / "evaluation" / name)["scores"]
        right = found["class_right"]
        estimate = Estimate(right["mean"], right["low"], right["high"], right["n"])
        return found["feature_distance"]["mean"], estimate

    points, references = [], {}
    for name, autoencoder in autoencoders.items():
        marks = f"{name}_reconstructions"
        emoji_images.reconstructions(samples, load_autoencoder(autoencoder), images / marks)
        references[name] = Reference(*scored(marks))
        steps = files.read_json(root / name / "config.json")["engine"]
        for step in sorted({*steps["export_at_steps"], steps["steps"]}):
            early = step != steps["steps"]
            export = root / name / (f"{EXPORT}_step_{step:08d}" if early else EXPORT)
            drawn = f"{name}_{step:08d}"
            draw_class_set(
                ClassSetConfig(images / drawn, export, autoencoder, config.sampling, config.num_images)
            )
            points.append(Point(name, step, *scored(drawn)))
            print(f"      {points[-1].text()}", flush=True)
    seconds = {row["name"]: row["seconds"] for row in files.read_json(root / "durations.json")}
    found = machine()
    text = page(
        points,
        references,
        seconds,
        f"{found['cores']} cores of {found['processor']}, GPU: {found['gpu']}",
        num_images=config.num_images,
        num_real=len(samples),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, text)
