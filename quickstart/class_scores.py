"""The last step of `make quickstart-class`: scores every export of every training, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from base import files
from base.terminal import say
from data.image_set import ImageSet
from engine.checkpoint_folder import EXPORT
from evaluation.environment import machine
from evaluation.features.representation import RepresentationFeatures
from evaluation.metrics.interval import Estimate
from evaluation.runner import evaluate
from generator.class_conditional.class_set import ClassSetConfig, draw_class_set
from quickstart import emoji_images
from quickstart.class_page import LABELS, Point, Reference, at_equal_time, charts, page
from quickstart.config import ClassScoresConfig
from quickstart.judge import Judge
from quickstart.suites.class_images import EmojiClassSuite
from report.run_contents import read_training
from tokenizer.autoencoders import load_autoencoder


def score(root: Path, base: Path, config: ClassScoresConfig, out: Path) -> None:
    """Scores drawings, and reconstructions of real images as their bound; writes page `out`, its charts and table."""
    images = root / "evaluation" / "images"
    samples = emoji_images.read_samples(root / "data/classes-validation", 1 << 30)
    autoencoders = {name: files.read_json(root / name / "config.json")["autoencoder"] for name in LABELS}
    trainings = {name: read_training(root / name) for name in LABELS}
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
        for step, export in _exports(root / name):
            drawn = f"{name}_{step:08d}"
            draw_class_set(
                ClassSetConfig(images / drawn, export, autoencoder, config.sampling, config.num_images)
            )
            points.append(Point(name, step, trainings[name].seconds_at(step), *scored(drawn)))
            say(f"      {points[-1].text()}")
    paths = {}
    for name, svg in charts(points, references).items():
        paths[name] = f"{out.stem}_{name}.svg"
        files.write_text(out.with_name(paths[name]), svg)
    found = machine()
    about = f"{found['cores']} cores of {found['processor']}, GPU: {found['gpu']}"
    shape = files.read_json(root / "rpiae" / "config.json")["generator"]
    network = f"width {shape['width']}, {shape['num_layers']} layers"
    counts = {"num_images": config.num_images, "num_real": len(samples)}
    text = page(points, references, about, paths, network=network, **counts)
    files.write_text(out, text)
    say("\n".join(at_equal_time(points)))


def _exports(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every existing export, steps ascending; the last step's export must exist."""
    engine = files.read_json(run_dir / "config.json")["engine"]
    early = [(step, run_dir / f"{EXPORT}_step_{step:08d}") for step in sorted({*engine["export_at_steps"]})]
    there = [(step, export) for step, export in early if export.is_dir() and step < engine["steps"]]
    return [*there, (engine["steps"], run_dir / EXPORT)]
