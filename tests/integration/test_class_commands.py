"""Class-conditional training and sampling by their commands: killed and resumed, on one rank and two, guided by an
early export."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from base.config import UserError
from base.team import Team
from data.adm_npz import write_npz
from data.image_set import ImageSet, Item, write_manifest
from data.shards import ShardDataset
from evaluation.features.representation import RepresentationFeatures
from evaluation.reference import Reference
from evaluation.runner import evaluate
from evaluation.suites.generation import GenerationSuite, Spaces
from generator.class_conditional.class_set import ClassSetConfig, class_drawings, draw_class_set
from generator.class_conditional.config import ClassSamplingConfig, DitConfig
from generator.class_conditional.model import create_generator, load_generator
from helpers.commands import curve, finish, on_ranks
from launch import export as export_command
from launch import sample_class, train_class
from launch.runs import entry
from quickstart.emoji_images import read_samples, real_renders
from tokenizer.config import EncodeConfig
from tokenizer.encode import encode_shards
from tokenizer.rpiae import Autoencoder

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 44
STEPS_PER_KILL = 6
StartRanks = Callable[[str, list[str], int, Path], list[BaseProcess]]
SAMPLING = ClassSamplingConfig(num_steps=3, guidance=2.0, batch_images=3)


@pytest.fixture(scope="module")
def inputs(
    tiny_autoencoder: Callable[..., Autoencoder],
    emoji_shards: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Labelled emoji shards, an untrained autoencoder, latents of images and their mirror images, a config."""
    root = tmp_path_factory.mktemp("class")
    emoji_shards(root / "pixels", "classes-train", 48, 24)
    tiny_autoencoder(root / "autoencoder")
    encode = EncodeConfig(
        str(root / "autoencoder"), str(root / "pixels"), str(root / "latents"), None, horizontal_flip=True
    )
    encode_shards(encode, rank=0, world=1, barrier=lambda: None)
    (root / "class.yaml").write_text(
        f"""
task: class
run_dir: unused
data: {{shards: {root}/latents, num_streams: 2}}
packing: {{images_per_pack: 4, class_dropout: 0.2}}
generator: {{num_classes: {NUM_CLASSES}, width: 32, num_layers: 2, num_heads: 4}}
engine:
  steps: 5
  optimizer: {{lr: 1.0e-2, schedule: linear, final_lr: 1.0e-3, decay_start_step: 2, decay_end_step: 5}}
  export_at_steps: [2, 4]
  log_every_steps: 1
  checkpoint_every_steps: 2
  wandb: disabled
autoencoder: {root}/autoencoder
num_preview_images: 3
preview_sampling: {{num_steps: 2}}
"""
    )
    return root


def train(inputs: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> str:
    config = ["--config", str(inputs / "class.yaml"), f"run_dir={run_dir}", *overrides]
    return finish(on_ranks("train_class", *config, ranks=ranks))


def wait_for_steps(run_dir: Path, steps: int, process: BaseProcess) -> None:
    """Counts the lines of the log; the last one may be half written."""
    log, output = run_dir / "metrics.jsonl", run_dir.with_suffix(".log")
    deadline_s = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert process.is_alive() and time.monotonic() < deadline_s, output.read_text()[-4000:]
        time.sleep(0.001)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """An undisturbed run on one rank."""
    train(inputs, inputs / "run")
    return inputs / "run"


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    """Stopped by lowering its steps: the state is the checkpoint's, and the rate follows the decay's own steps."""
    resumed = tmp_path / "run"
    train(inputs, resumed, "engine.steps=3", "engine.export_at_steps=[2]")
    assert "resumed at step 3/5" in train(inputs, resumed)
    for export in ("export", "export_step_00000002", "export_step_00000004"):
        assert weights(resumed / export) == weights(finished / export), export
    assert curve(resumed) == curve(finished)
    assert Image.open(next((finished / "samples").glob("*.png"))).size == (3 * 32, 32)


def test_a_checkpoint_is_exported_and_drawn_from_as_the_run_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 4 lies before the end, and its early export was written by the training itself."""
    for step, export_name in (("4", "export_step_00000004"), ("latest", "export")):
        out = tmp_path / step
        call(export_command, "--run", finished, "--checkpoint", step, "--out", out, monkeypatch=monkeypatch)
        assert weights(out / "generator") == weights(finished / export_name), step
    sets = [tmp_path / "of_run", tmp_path / "of_folder"]
    for run, images in zip((finished, tmp_path / "latest"), sets, strict=True):
        options = ("--images", 3, "--steps", 2, "--out", images)
        call(sample_class, "--run", run, *options, monkeypatch=monkeypatch)
    drawn = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
        for folder in sets
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    unfinished = tmp_path / "run"
    shutil.copytree(finished / "checkpoints", unfinished / "checkpoints")
    arguments = ["--run", str(unfinished), "--images", "1", "--out", str(tmp_path / "x")]
    capsys.readouterr()
    line = mistake(sample_class, arguments, monkeypatch, capsys)
    assert "not finished; its newest checkpoint is of step 5" in line and "--checkpoint latest" in line


def call(module: Any, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    assert entry.run(module.main) == 0


def test_early_exports_hold_the_averages_of_their_step(finished: Path) -> None:
    exports = [weights(finished / f"export_step_0000000{step}") for step in (2, 4)]
    assert len({*exports, weights(finished / "export")}) == 3
    assert load_generator(finished / "export_step_00000002").config.num_classes == NUM_CLASSES


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_undisturbed_one(
    num_kills: int, inputs: Path, start_ranks: StartRanks, tmp_path: Path
) -> None:
    """SIGKILL, each time after some more steps and a random while; most kills leave a checkpoint half written."""
    steps = (num_kills + 2) * STEPS_PER_KILL
    rhythm = [f"engine.steps={steps}", "engine.checkpoint_every_steps=2", "engine.sample_every_steps=5"]
    rhythm += [f"engine.export_at_steps={list(range(3, steps, 3))}", "engine.keep_checkpoints=2"]

    def start(run_dir: Path) -> BaseProcess:
        config = ["--config", str(inputs / "class.yaml"), f"run_dir={run_dir}", *rhythm]
        script = str(ROOT / "launch" / "train_class.py")
        (process,) = start_ranks(script, config, 1, run_dir.with_suffix(".log"))
        return process

    draws, killed, undisturbed = random.Random(num_kills), tmp_path / "killed", tmp_path / "undisturbed"
    unfinished: Counter[str] = Counter()
    for number in range(1, num_kills + 1):
        process = start(killed)
        wait_for_steps(killed, number * STEPS_PER_KILL, process)
        time.sleep(draws.uniform(0, 0.1))
        assert process.is_alive()
        process.kill()
        process.join()
        unfinished.update(path.name for path in killed.rglob(".*.tmp"))
    print(f"{num_kills} kills left unfinished {dict(unfinished)}")
    for run_dir in (killed, undisturbed):
        process = start(run_dir)
        process.join(300)
        assert process.exitcode == 0, run_dir.with_suffix(".log").read_text()[-4000:]
    # The first kill may come before the first checkpoint is whole.
    assert killed.with_suffix(".log").read_text().count("resumed at step") >= num_kills - 1
    exports = sorted(path.name for path in undisturbed.glob("export*"))
    assert len(exports) == len(range(3, steps, 3)) + 1
    assert {name: weights(killed / name) for name in exports} == {
        name: weights(undisturbed / name) for name in exports
    }
    assert tree(killed / "samples") == tree(undisturbed / "samples")
    assert curve(killed) == curve(undisturbed) and len(curve(killed)) == steps


@pytest.mark.slow
def test_two_ranks_give_the_loss_curve_of_one(finished: Path, inputs: Path, tmp_path: Path) -> None:
    train(inputs, tmp_path / "run", ranks=2)
    # The sums run in another order: fp32 rounding, amplified by AdamW's division in the first steps.
    assert curve(tmp_path / "run") == pytest.approx(curve(finished), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_every_zero_stage_trains_alike(zero: int, finished: Path, inputs: Path, tmp_path: Path) -> None:
    train(inputs, tmp_path / "run", f"engine.zero_stage={zero}", ranks=2)
    assert curve(tmp_path / "run") == pytest.approx(curve(finished), rel=1e-4)  # as above


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scores_on_the_way_are_those_of_the_exports(
    world: int, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    """10 images in blocks of 4: of two ranks, which under ZeRO-3 must draw alike often, one draws for nothing."""
    run_dir, reference = tmp_path / "run", tmp_path / "real"
    real_renders(read_samples(inputs / "pixels", 12), reference, 32)
    suites = f"{{generation: {{reference: {reference}, inception: none, features: {inputs}/autoencoder}}}}"
    settings = ["every_steps=2", "num_images=10", "sampling={num_steps: 3, guidance: 2, batch_images: 4}"]
    options = [f"evaluation.{setting}" for setting in (*settings, f"suites={suites}")]
    printed = train(inputs, run_dir, f"engine.zero_stage={3 if world == 2 else 1}", *options, ranks=world)
    if world == 1:
        assert weights(run_dir / "export") == weights(finished / "export")
    assert "evaluated step 2 in" in printed and "generation/feature_distance" in printed
    rows = [json.loads(line) for line in (run_dir / "scores.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    features = RepresentationFeatures.load(str(inputs / "autoencoder"))
    for row, export in zip(rows, ("export_step_00000002", "export_step_00000004", "export"), strict=True):
        images = tmp_path / export
        sampling = ClassSamplingConfig(3, guidance=2.0, batch_images=4, time_shift="auto")
        draw_class_set(
            ClassSetConfig(images, run_dir / export, str(inputs / "autoencoder"), sampling, num_images=10)
        )
        suite = GenerationSuite(Reference.open(reference), Spaces(other=features), tmp_path / "store")
        scores = evaluate(suite, images, tmp_path / f"scores_{export}")["scores"]
        found = {name.removeprefix("generation/"): value for name, value in row.items() if "/" in name}
        assert found == {name: entry["mean"] for name, entry in scores.items()}
    assert not (run_dir / "evaluation" / "store").exists()


@pytest.mark.slow
def test_an_evaluation_that_fails_on_one_rank_ends_all(inputs: Path, tmp_path: Path) -> None:
    """Only the first rank scores; the other one waits for it."""
    real_renders(read_samples(inputs / "pixels", 1), tmp_path / "real", 32)
    suites = (
        f"{{generation: {{reference: {tmp_path}/real, inception: none, features: {inputs}/autoencoder}}}}"
    )
    options = ["evaluation.every_steps=2", "evaluation.num_images=4", f"evaluation.suites={suites}"]
    config = ["--config", str(inputs / "class.yaml"), f"run_dir={tmp_path}/run", *options]
    arguments = on_ranks("train_class", *config, "engine.zero_stage=3", ranks=2)
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert result.returncode != 0
    printed = result.stdout + result.stderr
    assert "features of 1 image" in printed, printed


@pytest.fixture(scope="module")
def drawn(finished: Path, inputs: Path) -> Path:
    """A set drawn on one rank with AutoGuidance."""
    out = inputs / "set"
    assert draw_class_set(set_config(finished, inputs, out)) == 50
    return out


def set_config(finished: Path, inputs: Path, out: Path, **fields: object) -> ClassSetConfig:
    config = {"num_images": 50, "guide": finished / "export_step_00000002", "sampling": SAMPLING} | fields
    return ClassSetConfig(out, finished / "export", str(inputs / "autoencoder"), **config)  # type: ignore[arg-type]


def tree(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def test_two_ranks_draw_the_same_bytes_and_go_on_where_a_stopped_run_was(
    drawn: Path, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    draw_class_set(set_config(finished, inputs, out), Team(1, 2))
    assert 0 < len(list(out.rglob("*.png"))) < 50 and not (out / "manifest.jsonl").exists()
    for path in sorted(out.rglob("*.png"))[::4]:  # as a killed run leaves it: some blocks are not complete
        path.unlink()
    for rank in (1, 0):
        draw_class_set(set_config(finished, inputs, out), Team(rank, 2))
    assert tree(out) == tree(drawn)


@pytest.mark.slow
def test_the_command_draws_the_same_bytes_on_two_ranks_and_after_a_stop(
    drawn: Path, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    draw_class_set(set_config(finished, inputs, out))
    names = sorted(path for path in out.rglob("*.png"))
    for path in [
        *names[::3],
        out / "manifest.jsonl",
    ]:  # as a killed run leaves it: blocks that are complete, and not
        path.unlink()
    guide = ["--guide", str(finished / "export_step_00000002"), "--guidance", "2"]
    options = ["--images", "50", "--steps", "3", "--batch-images", "3", "--npz", str(tmp_path / "set.npz")]
    printed = finish(
        on_ranks("sample_class", "--run", str(finished), "--out", str(out), *options, *guide, ranks=2)
    )
    assert "50 images" in printed
    assert tree(out) == tree(drawn)
    assert (tmp_path / "set.npz").is_file()


def test_an_npz_holds_the_images_in_the_manifests_order(drawn: Path, tmp_path: Path) -> None:
    images = ImageSet.open(drawn)
    write_npz(images, tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as stored:
        pixels = stored["arr_0"]
    assert pixels.shape == (50, 32, 32, 3) and pixels.dtype == np.uint8
    expected = images.read_all(images.items, "result").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, expected)


def test_images_do_not_depend_on_the_batch_but_for_rounding(
    drawn: Path, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    sampling = ClassSamplingConfig(num_steps=3, guidance=2.0, batch_images=50)
    draw_class_set(set_config(finished, inputs, tmp_path, sampling=sampling))
    first, second = ImageSet.open(drawn), ImageSet.open(tmp_path)
    assert [item.key for item in first.items] == [item.key for item in second.items]
    pixels = [images.read_all(images.items, "result").int() for images in (first, second)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1  # rounding to 8 bits


def test_classes_are_balanced_and_a_larger_set_holds_the_smaller_one() -> None:
    small, large = class_drawings(10, 25, seed=0), class_drawings(10, 50, seed=0)
    assert large[:25] == small and len({one.seed for one in large}) == 50
    counts = [sum(one.label == label for one in small) for label in range(10)]
    assert counts == [3] * 5 + [2] * 5
    assert {one.seed for one in class_drawings(10, 50, seed=1)}.isdisjoint(one.seed for one in large)


def test_guidance_moves_away_from_the_guide(
    drawn: Path, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    """Without a guide it is the model without class; outside the interval there is none."""
    sets = {
        "class": {"guide": None},
        "interval": {
            "guide": None,
            "sampling": ClassSamplingConfig(3, guidance=2.0, guidance_interval=(0.0, 0.01)),
        },
        "none": {"guide": None, "sampling": ClassSamplingConfig(3)},
    }
    pixels = {"auto": tree(drawn)["result/0000/00000.png"]}
    for name, fields in sets.items():
        draw_class_set(set_config(finished, inputs, tmp_path / name, num_images=1, **fields))
        pixels[name] = tree(tmp_path / name)["result/0000/00000.png"]
    assert pixels["interval"] == pixels["none"] and len(set(pixels.values())) == 3


@pytest.mark.parametrize("other", ["settings", "guide", "latents"])
def test_what_does_not_fit_is_refused(
    other: str, drawn: Path, finished: Path, inputs: Path, tmp_path: Path
) -> None:
    if other == "settings":
        with pytest.raises(UserError, match=r"other settings \(num_steps: 3 there, 4 here\)"):
            draw_class_set(set_config(finished, inputs, drawn, sampling=ClassSamplingConfig(4, guidance=2.0)))
        return
    if other == "guide":
        with pytest.raises(UserError, match="no effect at guidance 1"):
            set_config(finished, inputs, tmp_path, sampling=ClassSamplingConfig(3))
        return
    latents = ShardDataset.open(inputs / "latents").manifest.latent
    assert latents is not None
    create_generator(DitConfig(3, 32, 1, 4), latents, seed=0).save(tmp_path)
    with pytest.raises(UserError, match="other latents or classes"):
        draw_class_set(set_config(finished, inputs, tmp_path / "set", guide=tmp_path))


def test_an_npz_of_images_of_two_sizes_is_refused_and_leaves_nothing(drawn: Path, tmp_path: Path) -> None:
    images = ImageSet.open(drawn)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    odd = Item("odd", {"result": "small.png"}, {})
    full = [
        Item(one.key, {"result": Path(shutil.copy(images.path(one, "result"), tmp_path)).name}, {})
        for one in images.items
    ]
    write_manifest(tmp_path, [*full, odd])
    with pytest.raises(UserError, match="one size"):
        write_npz(ImageSet.open(tmp_path), tmp_path / "set.npz")
    assert not (tmp_path / "set.npz").exists()


def mistake(
    module: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    assert entry.run(module.main) == 2  # type: ignore[attr-defined]
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_are_one_line(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(inputs / "class.yaml"), f"run_dir={tmp_path / 'run'}"]
    pixels = mistake(train_class, [*config, f"data.shards={inputs / 'pixels'}"], monkeypatch, capsys)
    assert "holds pixels, not latents" in pixels
    late = mistake(train_class, [*config, "engine.export_at_steps=[9]"], monkeypatch, capsys)
    assert "give steps from 1 to 5" in late
    options = ["--images", "4", "--out", str(tmp_path / "set")]
    missing = mistake(sample_class, ["--run", str(tmp_path), *options], monkeypatch, capsys)
    assert "no export folder" in missing


def test_dry_run_of_the_papers_model_needs_no_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_class", "--dry-run"])
    assert entry.run(train_class.main) == 0
    printed = capsys.readouterr().out
    assert (
        "trained: 675,334,528 of 675,629,696" in printed and "a step: 1,024 images of 256 tokens" in printed
    )
