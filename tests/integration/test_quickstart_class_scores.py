"""The last step of `make quickstart-class` on untrained networks: every export is drawn, judged, and on the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from base import config
from base.config import to_dict
from base.files import write_json, write_text
from data.shards import LatentInfo
from generator.class_conditional.config import ClassSamplingConfig, DitConfig
from generator.class_conditional.model import create_generator
from launch.runs.configs import ClassRun
from quickstart import class_scores
from quickstart.class_page import LABELS
from quickstart.config import ClassScoresConfig, JudgeConfig
from quickstart.judge import JudgeObjective
from quickstart.judge_network import SceneClasses
from quickstart.pictures.scenes import BACKGROUND_NAMES, OBJECT_NAMES
from quickstart.standin import IdentityObjective
from quickstart.train_standin import StandInRun
from tokenizer.export import fingerprint
from tokenizer.rpiae import Autoencoder

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_IMAGES = 6


def test_every_export_of_every_training_stands_on_the_page(
    emoji_shards: Callable[..., None],
    tiny_autoencoder: Callable[..., Autoencoder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, base = tmp_path / "class", tmp_path / "quickstart"
    emoji_shards(root / "data/classes-validation", "classes-validation", 8)
    tiny_autoencoder(tmp_path / "autoencoder", image_px=64)
    features = config.load(StandInRun, CONFIGS / "ablation" / "features.yaml").standin
    for folder, objective in (
        (base / "judge", JudgeObjective(JudgeConfig(), SceneClasses(OBJECT_NAMES, BACKGROUND_NAMES))),
        (root / "features", IdentityObjective(features)),
    ):
        (folder / "export").mkdir(parents=True)
        objective.export(folder / "export")
    latents = LatentInfo("fp32", (6, 4, 4), (0.0,) * 6, (1.0,) * 6, fingerprint(tmp_path / "autoencoder"), "")
    overrides = [
        f"autoencoder={tmp_path / 'autoencoder'}",
        "engine.steps=30",
        "engine.export_at_steps=[10,20]",
    ]
    paces = {"rpiae": 0.5, "rae": 0.75}  # of the VAE's nothing is logged; the exports of step 20 are gone
    for seed, name in enumerate(LABELS):
        run = config.load(ClassRun, CONFIGS / "quickstart_class" / f"{name}.yaml", overrides)
        write_json(root / name / "config.json", to_dict(run))
        for export in ("export_step_00000010", "export"):
            (root / name / export).mkdir()
            create_generator(DitConfig(44, 32, 1, 4), latents, seed).save(root / name / export)
    for name, pace in paces.items():
        lines = [{"step": step, "loss": 1.0, "step_s": pace} for step in (10, 20, 30)]
        write_text(root / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    scores = ClassScoresConfig(NUM_IMAGES, ClassSamplingConfig(num_steps=1))
    class_scores.score(root, base, scores, tmp_path / "docs" / "class.md")
    page = (tmp_path / "docs" / "class.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("|")]
    assert [row[0:3] for row in rows if row[1] == "distance"] == [["", "distance", "step 10"]]
    assert sum(row[1] in LABELS.values() for row in rows) == 2 + 3 * 3, "two at equal time, all by step"
    assert {"", "RAE", "8", "22"} == {*next(row for row in rows if row[1:3] == ["RAE", "8"])}
    assert "After 15 s, when RPiAE had done its 30 steps." in page and "Left out: VAE." in page
    assert "After 15 s, when RPiAE" in capsys.readouterr().out
    for chart in ("class_distance.svg", "class_right.svg"):
        assert f"]({chart})" in page
        drawn = (tmp_path / "docs" / chart).read_text()
        assert drawn.count("stroke-width: 1.6") == 2 * len(paces), "a curve each, and its line in the legend"
    for name in LABELS:
        found = json.loads((root / "evaluation" / f"{name}_00000010" / "scores.json").read_text())["scores"]
        assert found["class_right"]["n"] == found["feature_distance"]["n"] == NUM_IMAGES
        assert (
            len(list((root / "evaluation/images" / f"{name}_00000030" / "result").rglob("*.png")))
            == NUM_IMAGES
        )
    assert torch.isfinite(torch.tensor(found["feature_distance"]["mean"]))
