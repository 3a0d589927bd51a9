"""The ablation's page says of every trend what the numbers say."""

from pathlib import Path

import pytest

from base.config import load
from base.files import write_json
from evaluation.metrics.interval import Estimate
from launch.runs.configs import TokenizerRun
from quickstart.ablation import LAST_OF_BASE, VARIANTS, AblationRun, build_steps
from quickstart.ablation_page import LABELS, TRENDS, Row, page
from quickstart.train_standin import StandInRun


def row(name: str, distance: float = 1.0, probe: float = 0.5) -> Row:
    return Row(name, 22.0, 0.8, distance, Estimate(probe, probe - 0.02, probe + 0.02, 1000))


def verdict_of(rows: list[Row], claim: str) -> str:
    (line,) = [
        line
        for line in page(rows, "machine", num_images=1, num_probe=1, num_classes=2).splitlines()
        if claim in line
    ]
    return line.split("|")[-2].strip()


@pytest.mark.parametrize(
    ("ours", "other", "verdict"),
    [
        (0.5, 1.0, "yes"),
        (1.0, 0.5, "no, the reverse"),
        (1.0, 1.01, "not distinguishable (less than 2% apart)"),
        (0.0, 0.0, "not distinguishable (less than 2% apart)"),
    ],
)
def test_less_distance_is_better(ours: float, other: float, verdict: str) -> None:
    rows = [row("decoder", distance=ours), row("joint", distance=other)]
    assert verdict_of(rows, "three stages reconstruct better than one") == verdict


@pytest.mark.parametrize(
    ("ours", "other", "verdict"),
    [
        (0.9, 0.5, "yes"),
        (0.5, 0.9, "no, the reverse"),
        (0.5, 0.53, "not distinguishable (intervals overlap)"),
    ],
)
def test_more_of_the_probe_is_better(ours: float, other: float, verdict: str) -> None:
    rows = [row("pivot", probe=ours), row("no_pivot", probe=other)]
    assert verdict_of(rows, "the pivot loss keeps what a linear probe reads") == verdict


def test_every_variant_has_a_label_and_missing_ones_leave_their_trends_out() -> None:
    assert LABELS.keys() == VARIANTS.keys() | {"pivot", "bridge", "decoder"}
    text = page([row("pivot"), row("bridge")], "machine", num_images=1, num_probe=1, num_classes=2)
    assert sum(trend.claim in text for trend in TRENDS) == 1


def test_every_training_of_the_chain_reads_its_config_and_writes_below_the_root(tmp_path: Path) -> None:
    root, base = tmp_path / "variants", tmp_path / "base"
    write_json(base / "steps" / f"{LAST_OF_BASE}.json", {"identity": "trained before"})
    *trainings, scores = build_steps(AblationRun(root=str(root)), root, base)
    assert [step.name for step in trainings] == ["features", *VARIANTS]
    for step in trainings:
        assert not callable(step.work)
        script, _, config, *overrides = step.work[-4:]
        assert Path(script).is_file()
        run = load(StandInRun if step.name == "features" else TokenizerRun, config, overrides)
        assert run.run_dir == f"{root}/{step.name}"
        assert step.settings == "trained before", "variants of another base are not kept"
    assert callable(scores.work)
