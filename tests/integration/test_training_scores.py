"""Section `evaluation` of a config: images drawn with the weights in memory are those an export draws; mistakes are one
line. The whole of it, in trainings on one rank and two: tests/integration/test_class_commands.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from base.config import ConfigError, UserError, from_dict
from data.config import PixelConfig
from data.image_set import ImageSet
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import LatentInfo
from engine import distributed
from engine.distributed import Ranks
from evaluation.metrics.reconstruction import psnr_db
from evaluation.stage_set import ROLES
from generator.config import FlowConfig, GeneratorConfig, MotConfig
from generator.model import Generator
from generator.objective import FlowObjective
from generator.prompt_set import SampledSetConfig, draw_set
from generator.sampling_config import SamplingConfig
from launch.runs.configs import GeneratorRun, TokenizerRun
from launch.runs.periodic_config import PromptEvaluationConfig, StageEvaluationConfig
from launch.runs.periodic_scores import _of_prompts, _of_stage, check
from quickstart.emoji_images import read_samples, real_renders, reconstructions
from tokenizer.export import fingerprint
from tokenizer.rpiae import Autoencoder
from tokenizer.training.objective_base import StageObjective

SAMPLING = SamplingConfig(num_steps=2, text_guidance=2.0, time_shift=3.0, batch_images=2)


@pytest.fixture(scope="module")
def inputs(
    tiny_autoencoder: Callable[..., Autoencoder],
    emoji_shards: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Pixel shards, an untrained autoencoder, a text tokenizer, real images, a file of prompts and edits."""
    root = tmp_path_factory.mktemp("scores")
    emoji_shards(root / "pixels", "scenes-train", 12)
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], root / "text", 400)
    tiny_autoencoder(root / "autoencoder")
    real_renders(read_samples(root / "pixels", 12), root / "real", 32)
    first = ImageSet.open(root / "real")
    rows = [
        {"prompt": "a red apple on blue", "key": "apple"},
        {"prompt": "two dogs", "key": "dogs"},
        {"image": str(first.path(first.items[0], "result")), "instruction": "make it blue", "key": "blue"},
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@dataclass(frozen=True)
class Run:
    """Of a run's config what these tests need."""

    evaluation: StageEvaluationConfig


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """One rank that has joined no process group."""
    monkeypatch.setattr(distributed, "patient", lambda ranks, timeout_s: ranks)
    return cast(
        Ranks,
        SimpleNamespace(
            rank=0, world=1, device=torch.device("cpu"), barrier=lambda: None, gather=lambda v: [v]
        ),
    )


def generation(inputs: Path) -> dict[str, Any]:
    options = {
        "reference": str(inputs / "real"),
        "inception": "none",
        "features": str(inputs / "autoencoder"),
    }
    return {"generation": options}


def test_prompts_are_drawn_as_the_export_draws_them(inputs: Path, alone: Ranks, tmp_path: Path) -> None:
    """Text and edits; every evaluation replaces the images of the last one."""
    text = load_text_tokenizer(str(inputs / "text"))
    shape = Autoencoder.load(inputs / "autoencoder").latent_shape
    latents = LatentInfo(
        "fp32", shape, (0.0,) * 6, (1.0,) * 6, fingerprint(inputs / "autoencoder"), text.fingerprint
    )
    backbone = MotConfig(400, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
    model = Generator.create(GeneratorConfig(backbone, max_side=4), latents, seed=0)
    with torch.no_grad():
        model.latent_out.weight.normal_(generator=torch.Generator().manual_seed(1))
    objective = FlowObjective("edit", model, FlowConfig(), text, start="")
    config = PromptEvaluationConfig(
        1, generation(inputs), str(inputs / "prompts.jsonl"), sampling=replace(SAMPLING, time_shift=9.0)
    )
    autoencoder = str(inputs / "autoencoder")
    run = SimpleNamespace(
        evaluation=config,
        run_dir=str(tmp_path / "run"),
        autoencoder=autoencoder,
        sampling=SAMPLING,
        engine=SimpleNamespace(precision="fp32"),
    )
    start = _of_prompts(cast(GeneratorRun, run))
    assert start is not None
    evaluation = start(alone, objective)
    scores = [evaluation.run(step) for step in (1, 2)]
    assert scores[0] == scores[1] and scores[0]["generation/feature_distance"] > 0
    model.save(tmp_path)
    drawn = SampledSetConfig(
        inputs / "prompts.jsonl", tmp_path / "set", tmp_path, autoencoder, str(inputs / "text"), SAMPLING
    )
    assert draw_set(drawn) == 3
    images = tmp_path / "run" / "evaluation" / "images"
    for path in (tmp_path / "set").rglob("*.png"):
        assert path.read_bytes() == (images / path.relative_to(tmp_path / "set")).read_bytes()
    steps = sorted(path.name for path in (tmp_path / "run" / "evaluation").glob("step_*"))
    assert steps == ["step_00000001", "step_00000002"]


def test_a_stage_is_scored_on_its_reconstructions(inputs: Path, alone: Ranks, tmp_path: Path) -> None:
    autoencoder = Autoencoder.load(inputs / "autoencoder").eval()
    objective = cast(StageObjective, SimpleNamespace(model=autoencoder))
    suites: dict[str, Any] = {"reconstruction": {"inception": "none", "vgg16": "none"}}
    config = StageEvaluationConfig(1, suites, str(inputs / "pixels"), num_images=10)
    pixels = PixelConfig(images_per_pack=4, image_px=32, resize_px=48, crop="random")
    run = SimpleNamespace(
        evaluation=config,
        run_dir=str(tmp_path / "run"),
        pixels=pixels,
        engine=SimpleNamespace(precision="fp32"),
    )
    start = _of_stage(cast(TokenizerRun, run))
    assert start is not None
    scores = start(alone, objective).run(7)
    reconstructions(read_samples(inputs / "pixels", 10), autoencoder, tmp_path / "set")
    images = ImageSet.open(tmp_path / "set")
    pairs = [images.read_all(images.items, role) for role in ("result", "original")]
    assert scores["reconstruction/psnr_db"] == pytest.approx(psnr_db(*pairs).mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suites": {}}, "evaluation: suites: names none"),
        (
            {"suites": {"generatoin": {}}},
            "'generatoin' is none that a training can run; there are reconstruction",
        ),
        ({"suites": {"linear": {}}}, "'linear' is none that a training can run"),
        (
            {"suites": {"generation": {}}},
            "evaluation: suites.generation: missing key 'reference'",
        ),
        (
            {"suites": {"generation": {"reference": "x", "images": "y"}}},
            "suites.generation: unknown key 'images'",
        ),
        (
            {"suites": {"generation": {"reference": "x", "distances": "fp8"}}},
            "suites.generation: distances: Input should be 'fp32' or 'fp16', not 'fp8'",
        ),
        ({"every_steps": 0}, "every_steps is 0"),
        ({"suites": {"generation": "x"}}, "suites"),
    ],
)
def test_mistakes_are_found_with_the_config(change: dict[str, Any], message: str) -> None:
    tree = {"every_steps": 5, "suites": {"reconstruction": {"inception": "none"}}, "shards": "s"} | change
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as error:
        from_dict(Run, {"evaluation": tree}, where="run.yaml")
    assert str(error.value).startswith("run.yaml: evaluation") and "\n" not in str(error.value)


def test_what_is_missing_is_missed_at_the_start(inputs: Path, tmp_path: Path) -> None:
    config = StageEvaluationConfig(1, {"reconstruction": {"inception": "none", "vgg16": "none"}}, "unused")
    check(config, ROLES)
    with pytest.raises(UserError, match="needs images 'original', this training makes result"):
        check(config, ("result",))
    broken = generation(inputs)
    broken["generation"]["reference"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        check(replace(config, suites=broken), ROLES)
