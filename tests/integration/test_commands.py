"""The commands of the README on tiny data: killed and resumed, on one rank and two, and with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from base import config
from data.samples.captions import read_captions
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import Sample, ShardDataset, ShardWriter
from engine.logs import WANDB_KEYS
from generator.model import Generator
from helpers.commands import curve, finish, on_ranks
from launch import export as export_command
from launch import sample as sample_command
from launch.runs import entry, training
from launch.runs.configs import GeneratorRun, TokenizerRun
from launch.runs.tasks import read_run
from quickstart.pictures.config import EmojiConfig
from quickstart.pictures.source import EmojiSource
from tokenizer.config import BridgeConfig, EncodeConfig
from tokenizer.encode import encode_shards
from tokenizer.rpiae import Autoencoder

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
TINY_VIT = "overrides={img_size: 64, patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}"
PARTS = (
    "stage.autoencoder.representation",
    "stage.perceptual.representation",
    "stage.discriminator.representation",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji shards, a text tokenizer, an untrained autoencoder with a bridge, and latents."""
    root = tmp_path_factory.mktemp("commands")
    source = EmojiSource(EmojiConfig(), "scenes-train", 40)
    samples = [source.sample(index) for index in range(len(source))]
    write(root / "pixels", samples)
    captions = [caption for sample in samples for caption in read_captions(sample)]
    train_text_tokenizer(captions, root / "text", 400)
    run = config.load(TokenizerRun, QUICKSTART / "pivot.yaml", pivot_overrides(root, root / "unused"))
    assert run.stage.autoencoder is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("autoencoder", "another"):
            autoencoder = Autoencoder(run.stage.autoencoder)
            autoencoder.add_bridge(BridgeConfig(latent_channels=4, decoder_layers=1, num_heads=2))
            autoencoder.save(root / name)
    encode(root, root / "pixels", root / "latents", "autoencoder")
    return root


def write(directory: Path, samples: list[Sample]) -> None:
    with ShardWriter(directory, max_samples_per_shard=20, source="test") as writer:
        for sample in samples:
            writer.write(sample)


def encode(root: Path, shards: Path, out: Path, autoencoder: str) -> None:
    encode_config = EncodeConfig(str(root / autoencoder), str(shards), str(out), str(root / "text"))
    encode_shards(encode_config, rank=0, world=1, barrier=lambda: None)


def pivot_overrides(root: Path, run_dir: Path) -> list[str]:
    """The quickstart's pivot stage, tiny, with every loss from the first steps on."""
    vits = [f"{part}.{field}" for part in PARTS for field in (TINY_VIT, "weights=random")]
    return [
        *vits,
        f"run_dir={run_dir}",
        f"data.shards={root / 'pixels'}",
        "preview_shards=null",
        "pixels.images_per_pack=4",
        "stage.autoencoder.decoder={width: 32, layers: 1, heads: 2, mlp_width: 64, patch_px: 16}",
        "stage.adaptive_pivot_start_step=0",
        "stage.gan_update_start_step=0",
        "stage.gan_loss_start_step=1",
        *SHORT,
    ]


def t2i_overrides(root: Path, run_dir: Path) -> list[str]:
    """The quickstart's text-to-image training, tiny."""
    return [
        f"run_dir={run_dir}",
        f"data.shards={root / 'latents'}",
        f"text_tokenizer={root / 'text'}",
        "autoencoder=null",
        "preview_shards=null",
        "packing.tokens_per_pack=160",
        "generator.backbone.width=32",
        "generator.backbone.num_layers=2",
        "generator.backbone.mlp_width=64",
        *SHORT,
    ]


SHORT = [
    "engine.steps=5",
    "engine.log_every_steps=1",
    "engine.checkpoint_every_steps=2",
    "engine.async_checkpoint=false",  # which step is saved when a run is killed is then no race
    "engine.wandb=disabled",
]
SCRIPTS = {"pivot": ("train_tokenizer", pivot_overrides), "t2i": ("train_t2i", t2i_overrides)}


def command(task: str, inputs: Path, run_dir: Path, *extra: str, ranks: int = 1) -> list[str]:
    script, overrides = SCRIPTS[task]
    arguments = ["--config", str(QUICKSTART / f"{task}.yaml"), *overrides(inputs, run_dir), *extra]
    return on_ranks(script, *arguments, ranks=ranks)


def kill_at_step(arguments: list[str], run_dir: Path, step: int) -> None:
    """kill -9 as soon as `step` stands in metrics.jsonl."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module", params=["t2i", "pivot"])
def finished(request: pytest.FixtureRequest, inputs: Path) -> tuple[str, Path]:
    """An undisturbed run of each task on one rank."""
    run_dir = inputs / f"{request.param}-undisturbed"
    finish(command(request.param, inputs, run_dir))
    return request.param, run_dir


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(finished, inputs, tmp_path) -> None:
    task, undisturbed = finished
    run_dir = tmp_path / "run"
    kill_at_step(command(task, inputs, run_dir), run_dir, 3)
    assert not (run_dir / "export").exists()
    assert "resumed at step 2/5" in finish(command(task, inputs, run_dir))
    expected = (undisturbed / "export" / "model.safetensors").read_bytes()
    assert (run_dir / "export" / "model.safetensors").read_bytes() == expected
    assert curve(run_dir) == curve(undisturbed)


@pytest.mark.slow
def test_a_deterministic_run_takes_nothing_that_is_refused_and_is_the_same_run_on_a_cpu(
    finished, inputs, tmp_path
) -> None:
    task, undisturbed = finished
    finish(command(task, inputs, tmp_path / "run", "engine.deterministic=true"))
    expected = (undisturbed / "export" / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == expected


def test_a_checkpoint_is_exported_as_the_run_exports_itself(finished, inputs, tmp_path, monkeypatch) -> None:
    task, original = finished
    run_dir, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(original, run_dir)
    if task == "t2i":  # the fixture draws no grids
        tree = json.loads((run_dir / "config.json").read_text())
        (run_dir / "config.json").write_text(json.dumps({**tree, "autoencoder": str(inputs / "autoencoder")}))
    monkeypatch.setattr(
        sys, "argv", ["export", "--run", str(run_dir), "--checkpoint", "latest", "--out", str(out)]
    )
    assert entry.run(export_command.main) == 0
    folder = out if task == "pivot" else out / "generator"
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (run_dir / "export" / name).read_bytes(), name
    if task == "t2i":
        images = []
        for number, run in enumerate((run_dir, out)):
            image = tmp_path / f"{number}.png"
            options = ["--prompt", "a red apple", "--steps", "2", "--out", str(image)]
            monkeypatch.setattr(sys, "argv", ["sample", "--run", str(run), *options])
            assert entry.run(sample_command.main) == 0
            images.append(image.read_bytes())
        assert images[0] == images[1]


def test_two_ranks_give_the_loss_curve_of_one(finished, inputs, tmp_path) -> None:
    """The same two packs a step: on one rank one after the other, on two ranks side by side."""
    task, one = finished
    finish(command(task, inputs, tmp_path / "two", ranks=2))
    # The sums run in another order: fp32 rounding, amplified by AdamW's division in the first steps.
    assert curve(tmp_path / "two") == pytest.approx(curve(one), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_a_generator_with_a_head_alike(zero, inputs, tmp_path) -> None:
    head = "generator.head={width: 32, num_layers: 1, num_heads: 2}"
    alone, two = (tmp_path / name for name in ("one", "two"))
    finish(command("t2i", inputs, alone, head))
    finish(command("t2i", inputs, two, head, f"engine.zero_stage={zero}", ranks=2))
    assert curve(two) == pytest.approx(curve(alone), rel=1e-4)  # as above


@pytest.mark.slow
def test_a_generator_goes_on_from_two_ranks_on_one_and_then_on_three(start_ranks, inputs, tmp_path) -> None:
    """Another ZeRO stage each time, a kill in between: the same global batches and losses as in one piece."""
    script = ROOT / "launch" / "train_t2i.py"
    streams = ("data.num_streams=6", "engine.steps=9", "engine.checkpoint_every_steps=1")
    (whole,) = start_ranks(
        script, command("t2i", inputs, tmp_path / "whole", *streams)[2:], 1, tmp_path / "whole.log"
    )
    run_dir = tmp_path / "run"
    for ranks, zero, until in ((2, 2, 3), (1, 3, 6), (3, 1, None)):
        arguments = command("t2i", inputs, run_dir, *streams, f"engine.zero_stage={zero}")[2:]
        output = tmp_path / f"{ranks}.log"
        processes = start_ranks(script, arguments, ranks, output)
        while until is not None and not (run_dir / "checkpoints" / f"step_{until:08d}").exists():
            assert all(process.is_alive() for process in processes), output.read_text()[-4000:]
            time.sleep(0.01)
        if until is not None:
            processes[0].kill()
        for process in processes:
            process.join(200)
        assert ("resumed at step" in output.read_text()) == (ranks != 2)
    whole.join(200)
    assert whole.exitcode == 0 and [process.exitcode for process in processes] == [0, 0, 0]
    # Sums in another order, which Muon magnifies where a gradient is nearly singular.
    assert curve(run_dir) == pytest.approx(curve(tmp_path / "whole"), rel=1e-3)
    data = [
        json.loads((path / "checkpoints" / "step_00000009" / "state.json").read_text())["data"]
        for path in (run_dir, tmp_path / "whole")
    ]
    assert data[0] == data[1], "every stream stands at the same sample"


def error_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> str:
    """The one line that an entry point prints for a mistake found before the ranks meet."""
    module = __import__(f"launch.{Path(arguments[1]).stem}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", arguments[1:])
    capsys.readouterr()  # what was printed before the command
    assert entry.run(module.main) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_generator_goes_to_bagels_names_and_back_and_trains_on(inputs, tmp_path) -> None:
    backbone = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}  # Bagel's heads share out the width
    start = [f"generator.backbone.{field}={value}" for field, value in backbone.items()]
    start += ["generator.position_max_period=10000"]
    overrides = [*t2i_overrides(inputs, tmp_path / "run"), *start]
    run = config.load(GeneratorRun, QUICKSTART / "t2i.yaml", overrides)
    latents = ShardDataset.open(inputs / "latents").manifest.latent
    assert latents is not None
    (tmp_path / "ours").mkdir()
    Generator.create(run.generator, latents, seed=3).save(tmp_path / "ours")
    scripts = ROOT / "launch" / "export_bagel.py", ROOT / "launch" / "import_release.py"
    theirs, back = ["--out", str(tmp_path / "theirs")], ["--out", str(tmp_path / "back"), "--verify"]
    finish([sys.executable, str(scripts[0]), "--generator", str(tmp_path / "ours"), *theirs])
    source = ["--source", str(tmp_path / "theirs"), "--latents", str(inputs / "latents")]
    assert "none is left over" in finish([sys.executable, str(scripts[1]), "bagel", *source, *back])
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "back"))
    assert before == after
    start += [f"flow.init_from={tmp_path / 'back'}", "engine.steps=1"]
    assert "start: " in finish(command("t2i", inputs, tmp_path / "run", *start))


def test_reconstructions_are_scored_by_the_command(inputs, tmp_path, capsys, monkeypatch) -> None:
    images = tmp_path / "images"
    for sample in ShardDataset.open(inputs / "pixels").read(range(5)):
        images.mkdir(exist_ok=True)
        (images / f"{sample.key}.png").write_bytes(sample.parts["png"])
    autoencoder = str(inputs / "autoencoder")
    arguments = ["--autoencoder", autoencoder, "--images", str(images), "--out", str(tmp_path / "set")]
    finish([sys.executable, str(ROOT / "launch" / "reconstruct.py"), *arguments])
    arguments = [
        "--images",
        str(tmp_path / "set"),
        "--out",
        str(tmp_path / "scores"),
        "--features",
        autoencoder,
    ]
    networks = ["--inception", "none", "--vgg16", "none"]
    printed = finish(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), "reconstruction", *arguments, *networks]
    )
    assert [line.split(":")[0] for line in printed.splitlines() if ": " in line][:2] == ["psnr_db", "ssim"]
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    assert scores["feature_distance"]["of"] == "set" and scores["psnr_db"]["n"] == 5


def test_wandb_online_without_a_key_is_one_line_before_the_ranks_meet(
    inputs, tmp_path, capsys, monkeypatch
) -> None:
    for name in (*WANDB_KEYS, "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(training, "_start_ranks", lambda run_dir: pytest.fail("they meet"))
    arguments = command("t2i", inputs, tmp_path / "run", "engine.wandb=online")
    line = error_of(capsys, monkeypatch, arguments)
    assert "engine.wandb=online: no key" in line and "wandb login" in line


def test_a_wrong_key_names_the_nearest_one(inputs, tmp_path, capsys, monkeypatch) -> None:
    line = error_of(
        capsys, monkeypatch, command("t2i", inputs, tmp_path / "run", "engine.optimizer.learning_rate=1")
    )
    assert "engine.optimizer.learning_rate" in line and "did you mean 'engine.optimizer.lr'?" in line
    assert not (tmp_path / "run").exists()


def test_a_text_loss_of_text_to_image_is_refused(inputs, tmp_path, capsys, monkeypatch) -> None:
    text = ["flow.text_loss_weight=0.5", "generator.text_output=true"]
    line = error_of(capsys, monkeypatch, command("t2i", inputs, tmp_path / "run", *text))
    assert "flow.text_loss_weight is 0.5, but only interleaved samples mark text for a loss" in line
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(inputs, tmp_path, capsys, monkeypatch) -> None:
    encode(inputs, inputs / "pixels", tmp_path / "latents", "autoencoder")
    shard = sorted((tmp_path / "latents").glob("*.tar"))[1]
    shard.unlink()
    arguments = command("t2i", inputs, tmp_path / "run", f"data.shards={tmp_path / 'latents'}")
    assert shard.name in error_of(capsys, monkeypatch, arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_says_what_is_learned(finished, capsys, monkeypatch) -> None:
    config_of_run = str(finished[1] / "config.json")
    task = {"pivot": "tokenizer", "t2i": "t2i"}[finished[0]]
    assert read_run(config_of_run).task == task, (
        "with a source_dropout, as every t2i config that is written out"
    )
    script = str(ROOT / "launch" / "train_edit.py")
    line = error_of(capsys, monkeypatch, [sys.executable, script, "--config", config_of_run])
    assert f"task is {task}: start this config with launch/train_{task}.py" in line


def test_latents_of_another_tokenizer_are_refused(inputs, finished, tmp_path, capsys, monkeypatch) -> None:
    task, run = finished
    if task != "t2i":
        pytest.skip("concerns the generator")
    encode(inputs, inputs / "pixels", tmp_path / "latents", "another")
    start = [f"data.shards={tmp_path / 'latents'}", f"flow.init_from={run / 'export'}"]
    line = error_of(capsys, monkeypatch, command("t2i", inputs, tmp_path / "run", *start))
    assert "autoencoder" in line and "encode the data again" in line


@pytest.mark.parametrize("preview", ["null", "latents"])
def test_another_autoencoder_than_the_latents_is_refused_before_training(
    preview, inputs, tmp_path, capsys, monkeypatch
) -> None:
    shards = preview if preview == "null" else inputs / preview
    other = [f"autoencoder={inputs / 'another'}", f"preview_shards={shards}"]
    line = error_of(capsys, monkeypatch, command("t2i", inputs, tmp_path / "run", *other))
    assert f"{inputs / 'another'}: the training latents were encoded with another one" in line
    assert not (tmp_path / "run").exists()


def test_grids_are_drawn_under_the_time_shift_of_the_training(inputs, tmp_path) -> None:
    previews = [f"autoencoder={inputs / 'autoencoder'}", f"preview_shards={inputs / 'latents'}"]
    overrides = [*t2i_overrides(inputs, tmp_path), *previews, "flow.time_shift=3", "num_preview_images=1"]
    run = config.load(GeneratorRun, QUICKSTART / "t2i.yaml", [*overrides, "preview_sampling.time_shift=auto"])
    latents = ShardDataset.open(inputs / "latents").manifest.latent
    assert latents is not None
    preview = training._preview(run, load_text_tokenizer(run.text_tokenizer), latents)
    assert preview is not None and preview.sampling.time_shift == 3


def test_missing_data_of_the_papers_run_is_one_line(capsys, monkeypatch) -> None:
    line = error_of(capsys, monkeypatch, [sys.executable, str(ROOT / "launch" / "train_t2i.py")])
    assert "datasets/cc12m-latents" in line and "make_shards" in line


def test_an_empty_caption_stops_the_encoding_and_names_the_sample(inputs, tmp_path) -> None:
    samples = ShardDataset.open(inputs / "pixels").read(range(3))
    empty = Sample(samples[1].key, {**samples[1].parts, "json": b'{"caption": " "}'})
    write(tmp_path / "pixels", [samples[0], empty, samples[2]])
    with pytest.raises(config.UserError, match=rf"{samples[1].key}.*empty caption"):
        encode(inputs, tmp_path / "pixels", tmp_path / "latents", "autoencoder")
    assert (
        not list((tmp_path / "latents").glob("*.tar"))
        and not (tmp_path / "latents" / "manifest.json").exists()
    )


def test_a_corrupt_png_stops_the_training_with_one_line(inputs, tmp_path) -> None:
    samples = ShardDataset.open(inputs / "pixels").read(range(16))
    png = bytearray(samples[5].parts["png"])
    png[40:60] = bytes(20)
    write(
        tmp_path / "pixels",
        [*samples[:5], Sample(samples[5].key, {**samples[5].parts, "png": bytes(png)}), *samples[6:]],
    )
    output = finish(
        command("pivot", inputs, tmp_path / "run", f"data.shards={tmp_path / 'pixels'}"), status=2
    )
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and samples[5].key in errors[0]
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "generator").glob("*.yaml")), ids=lambda path: path.stem
)
def test_dry_run_of_the_papers_generator_needs_no_data(path, capsys, monkeypatch) -> None:
    script = "train_edit" if path.stem.startswith("edit") else "train_t2i"
    module = __import__(f"launch.{script}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [script, "--config", str(path), "--dry-run"])
    assert entry.run(module.main) == 0
    printed = capsys.readouterr().out
    run = config.load(GeneratorRun, path)
    assert f"run_dir: {run.run_dir}" in printed and "parameters: backbone 8" in printed
