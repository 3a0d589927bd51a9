"""The class-conditional quickstart: its chain, its suite, and what its page says of the paper's order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.sources.emoji import OBJECT_NAMES
from engine.config import load
from engine.files import write_json
from evaluation.judges.emoji import Verdict
from evaluation.manifest import ImageSet, Item, write_image, write_manifest
from evaluation.metrics.interval import Estimate
from evaluation.report.class_page import LABELS, Point, Reference, page, verdict
from evaluation.runner import evaluate
from evaluation.suites.emoji_class import EmojiClassSuite
from launch.quickstart_class import LAST_OF_BASE, QuickstartClassRun, build_steps
from launch.runs import ClassRun, EncodeRun

RIGHT = Estimate(0.5, 0.4, 0.6, 100)


def point(latents: str, distance: float, step: int = 40) -> Point:
    return Point(latents, step, distance, RIGHT)


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        ((1.0, 2.0, 3.0), ["RPiAE before RAE appears", "RPiAE before VAE appears", "RAE before VAE appears"]),
        ((3.0, 2.0, 2.01), ["RPiAE before RAE does not appear", "RAE before VAE cannot be told"]),
    ],
)
def test_the_order_is_judged_pair_by_pair(distances: tuple[float, ...], words: list[str]) -> None:
    text = verdict({name: point(name, d) for name, d in zip(LABELS, distances, strict=True)})
    assert all(word in text for word in words), text


def test_the_page_has_a_column_for_every_step_and_its_marks() -> None:
    points = [point(name, 1.5, step) for name in LABELS for step in (20, 40)]
    references = {name: Reference(0.25, RIGHT) for name in LABELS}
    text = page(points, references, dict.fromkeys(LABELS, 61.0), "machine", num_images=8, num_real=9)
    assert "| latents | distance, step 20 | distance, step 40 | reconstructions | training, s |" in text
    assert "| RPiAE | 1.50 | 1.50 | 0.25 | 61 |" in text
    assert "| RAE | 0.500 (0.400-0.600) | 0.500 (0.400-0.600) | 0.500 (0.400-0.600) |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:5]}) == len({line.count("|") for line in table[5:]}) == 1


class Features:
    """The mean colour."""

    name, fingerprint, dim, protocol = "colour", "colour", 3, {"network": "none"}

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3)) / 255


class RedIsApple:
    """A judge that sees the first class in every image that is more red than blue."""

    fingerprint = "judge"

    def __call__(self, pixels: Tensor) -> list[Verdict]:
        seen = [0 if image[0].float().mean() > image[2].float().mean() else 1 for image in pixels]
        return [
            Verdict((OBJECT_NAMES[i],), {n: float(n == OBJECT_NAMES[i]) for n in OBJECT_NAMES}, {}, "")
            for i in seen
        ]


def colours(folder: Path, reds: list[int], labels: list[int]) -> ImageSet:
    items = []
    for index, (red, label) in enumerate(zip(reds, labels, strict=True)):
        image = torch.tensor([red, 0, 255 - red], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
        write_image(folder / f"{index}.png", image.contiguous())
        items.append(Item(str(index), {"result": f"{index}.png"}, {"label": label}))
    write_manifest(folder, items)
    return ImageSet.open(folder)


def test_the_suite_counts_right_classes_and_measures_the_whole_set(tmp_path: Path) -> None:
    real = colours(tmp_path / "real", [250, 0, 240, 10], [0, 1, 0, 1])
    colours(tmp_path / "drawn", [250, 0, 240, 10], [0, 0, 0, 1])
    suite = EmojiClassSuite(RedIsApple(), Features(), real)  # type: ignore[arg-type]
    scores = evaluate(suite, tmp_path / "drawn", tmp_path / "out")["scores"]
    assert scores["class_right"]["mean"] == scores["class_best"]["mean"] == 0.75
    assert scores["feature_distance"]["mean"] == pytest.approx(0, abs=1e-6)  # the same images
    colours(tmp_path / "other", [255, 250, 255, 250], [0, 0, 0, 0])
    other = evaluate(suite, tmp_path / "other", tmp_path / "out2")["scores"]
    assert other["feature_distance"]["mean"] > 0.1


def test_every_training_of_the_chain_reads_its_config_and_what_it_reads_is_written_before(
    tmp_path: Path,
) -> None:
    run = load(QuickstartClassRun, "configs/quickstart_class/run.yaml")
    write_json(tmp_path / "steps" / f"{LAST_OF_BASE}.json", {"identity": "base"})
    steps = build_steps(run, Path(run.root), tmp_path)
    assert [step.name for step in steps][-1] == "scores" and len(steps) == 4 + 2 * len(LABELS) + 1
    for name in LABELS:
        training = load(ClassRun, f"configs/quickstart_class/{name}.yaml")
        encoding = load(EncodeRun, f"configs/quickstart_class/latents_{name}.yaml")
        assert training.run_dir == f"{run.root}/{name}"
        assert (training.data.shards, training.autoencoder) == (encoding.out, encoding.autoencoder)
        assert encoding.shards == f"{run.root}/data/classes-train" and encoding.text_tokenizer is None
