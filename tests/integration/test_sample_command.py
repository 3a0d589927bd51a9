"""A file of prompts becomes an image set: the same bytes on any ranks and after any kill, the same images in any
batches, and what does not fit is one line."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base import config
from base.config import UserError, to_dict
from base.files import write_json
from base.team import Team
from data.image_set import ImageSet, write_image
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import LatentInfo
from engine.distributed import free_port
from generator import prompt_set
from generator.model import Generator
from generator.pipeline import Pipeline
from generator.prompt_set import SampledSetConfig, draw_set
from generator.sampling import Condition
from generator.sampling_config import SamplingConfig
from helpers.commands import on_ranks
from launch import evaluate as launch_evaluate
from launch import sample
from launch.runs import entry
from launch.runs.configs import GeneratorRun
from tokenizer.export import fingerprint
from tokenizer.rpiae import Autoencoder

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingConfig(num_steps=3, text_guidance=2.0, source_guidance=1.5, time_shift=6.0, batch_images=3)
PROMPTS: list[dict[str, object]] = [
    {"prompt": "a red apple on blue", "tag": "single"},
    {"prompt": "two dogs", "key": "dogs", "seed": 3},
    {"image": "wide.png", "instruction": "make it blue"},
    {"prompt": "a small green house beside two dogs and a red apple"},
    {"image": ["wide.png", "square.png"], "instruction": "put both on blue", "key": "both"},
]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the commands below have; another number may round differently, and a forked process must not wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(
    one_thread: None,
    tiny_autoencoder: Callable[..., Autoencoder],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run of an untrained generator whose images depend on everything, and a file of prompts and edits."""
    root = tmp_path_factory.mktemp("sample")
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], root / "text", 400)
    autoencoder = tiny_autoencoder(root / "autoencoder")
    tiny = ["backbone.width=32", "backbone.num_layers=2", "backbone.mlp_width=64"]
    overrides = [f"run_dir={root / 'run'}", f"autoencoder={root / 'autoencoder'}", "task=edit"]
    overrides += [f"text_tokenizer={root / 'text'}", *(f"generator.{field}" for field in tiny)]
    run = config.load(GeneratorRun, ROOT / "configs" / "quickstart" / "t2i.yaml", overrides)
    fingerprints = fingerprint(root / "autoencoder"), load_text_tokenizer(str(root / "text")).fingerprint
    latents = LatentInfo("fp32", autoencoder.latent_shape, (0.0,) * 6, (1.0,) * 6, *fingerprints)
    model = Generator.create(run.generator, latents, seed=0)
    with torch.no_grad():
        drawn = torch.randn(model.latent_out.weight.shape, generator=torch.Generator().manual_seed(9))
        model.latent_out.weight.copy_(drawn / math.sqrt(32))
        model.backbone.embed_tokens.weight.mul_(50)
    export = root / "run" / "export"
    export.mkdir(parents=True)
    model.save(export)
    write_json(root / "run" / "config.json", to_dict(run))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 80, 3), np.uint8)
    Image.fromarray(pixels).save(root / "wide.png")
    Image.fromarray(pixels[:, :32]).save(root / "square.png")
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return root


def set_config(inputs: Path, out: Path, sampling: SamplingConfig = SAMPLING) -> SampledSetConfig:
    return SampledSetConfig(
        inputs / "prompts.jsonl",
        out,
        inputs / "run" / "export",
        str(inputs / "autoencoder"),
        str(inputs / "text"),
        sampling,
        images_per_prompt=2,
    )


def tree(root: Path) -> dict[str, bytes]:
    """Every file but the hidden temporary ones that a kill can leave, which no reader looks at."""
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def companies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Seeds of the images that are drawn together, call by call."""
    met: list[tuple[int, ...]] = []
    draw = Pipeline.draw

    def spy(
        self: Pipeline, conditions: list[Condition], seeds: list[int], sampling: SamplingConfig
    ) -> torch.Tensor:
        met.append(tuple(seeds))
        return draw(self, conditions, seeds, sampling)

    monkeypatch.setattr(Pipeline, "draw", spy)
    return met


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The set, drawn undisturbed on one rank in blocks of three."""
    assert draw_set(set_config(inputs, inputs / "whole")) == 10
    return inputs / "whole"


def test_the_set_is_what_evaluation_reads(whole) -> None:
    images = ImageSet.open(whole)
    keys = [f"{key}-{n}" for key in ("00000", "dogs", "00002", "00003", "both") for n in (0, 1)]
    assert [item.key for item in images.items] == keys
    assert images.missing(["result"]) == []
    assert images.read_all(images.items, "result").shape == (10, 3, 32, 32)
    by_key = {item.key: item for item in images.items}
    first, dogs, edit, both = (by_key[f"{key}-1"] for key in ("00000", "dogs", "00002", "both"))
    assert first.meta["prompt"] == "a red apple on blue" and first.meta["tag"] == "single"
    assert dogs.meta["seed"] == 4 and edit.meta["instruction"] == "make it blue"
    assert edit.meta["sampling"]["num_steps"] == 3 and "batch_images" not in edit.meta["sampling"]
    assert sorted(both.images) == ["result", "source0", "source1"]
    wide = Image.open(whole.parent / "wide.png").crop((24, 0, 56, 32))
    assert np.array_equal(images.read(edit, "source").permute(1, 2, 0).numpy(), np.asarray(wide))
    results = [images.read(item, "result") for item in images.items]
    assert all(not torch.equal(a, b) for n, a in enumerate(results) for b in results[:n])


@pytest.mark.parametrize("batch_images", [1, 8, 64])
def test_the_batch_size_changes_nothing_but_rounding(inputs, whole, batch_images, tmp_path) -> None:
    draw_set(set_config(inputs, tmp_path / "set", replace(SAMPLING, batch_images=batch_images)))
    found, expected = ImageSet.open(tmp_path / "set"), ImageSet.open(whole)
    assert found.items == expected.items
    results = (one.read_all(one.items, "result").int() for one in (found, expected))
    difference = (next(results) - next(results)).abs()
    # Matrix products and padded attention sum in another order (fp32, 1e-6), which the 8 bits of a PNG can only show
    # where a value lies beside a half: by one level, in few of 30,720 values.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_a_batch_of_another_size_may_finish_the_set(inputs, whole, tmp_path) -> None:
    out = tmp_path / "set"
    draw_set(set_config(inputs, out))
    (out / "result" / "dogs-0.png").unlink()
    draw_set(set_config(inputs, out, replace(SAMPLING, batch_images=8)))
    assert tree(out).keys() == tree(whole).keys()


def test_what_is_finished_is_kept_and_the_rest_drawn_in_its_old_company(
    inputs, whole, companies, tmp_path
) -> None:
    """Other company could round differently, which these few small images do not show."""
    out = tmp_path / "set"
    draw_set(set_config(inputs, out))
    undisturbed = companies.copy()
    assert [len(seeds) for seeds in undisturbed] == [3, 3, 3, 1]
    companies.clear()
    kept = out / "result" / "00000-0.png"
    before = kept.stat().st_mtime_ns
    for name in ("manifest.jsonl", "result/dogs-0.png", "source/00002-1.png"):
        (out / name).unlink()
    draw_set(set_config(inputs, out))
    assert companies == undisturbed[:2]
    assert tree(out) == tree(whole) and kept.stat().st_mtime_ns == before


def kill_with_images(inputs: Path, out: Path, num_images: int) -> None:
    """Draws in a process of its own, which is killed as soon as so many results are there."""
    process = multiprocessing.get_context("fork").Process(target=draw_set, args=(set_config(inputs, out),))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((out / "result").glob("[!.]*.png"))) < num_images:
        assert process.is_alive() and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_set_that_is_killed_and_run_again_has_the_bytes_of_an_undisturbed_one(
    inputs, whole, tmp_path, monkeypatch
) -> None:
    def slowly(path: Path, pixels: torch.Tensor) -> None:
        time.sleep(0.02)
        write_image(path, pixels)

    monkeypatch.setattr(prompt_set, "write_image", slowly)  # the forked processes inherit it
    out = tmp_path / "set"
    for num_images in (1, 2, 5, 6, 9):
        kill_with_images(inputs, out, num_images)
        assert not (out / "manifest.jsonl").exists()
        for path in (out / "result").glob("[!.]*.png"):
            Image.open(path).load()  # whole
    draw_set(set_config(inputs, out))
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": replace(SAMPLING, num_steps=4)}, "num_steps: 3 there, 4 here"),
        ({"sampling": replace(SAMPLING, seed=1)}, "seed: 0 there, 1 here"),
        ({"images_per_prompt": 1}, "images_per_prompt: 2 there, 1 here"),
        ({"prompts": "other.txt"}, "prompts: "),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(inputs, whole, change, words) -> None:
    if "prompts" in change:
        change = {"prompts": inputs / change["prompts"]}
        change["prompts"].write_text("a red apple\n")
    before = tree(whole)
    with pytest.raises(UserError, match=words) as error:
        draw_set(replace(set_config(inputs, whole), **change))
    assert "\n" not in str(error.value) and tree(whole) == before


def test_a_source_that_has_changed_is_refused_and_one_that_was_only_touched_is_not(
    inputs, whole, tmp_path
) -> None:
    for name in ("wide.png", "square.png", "prompts.jsonl"):
        shutil.copyfile(inputs / name, tmp_path / name)
    config = replace(set_config(inputs, tmp_path / "set"), prompts=tmp_path / "prompts.jsonl")
    draw_set(config)
    os.utime(tmp_path / "square.png", (0, 0))
    (config.out / "result" / "both-1.png").unlink()
    draw_set(config)
    assert tree(config.out) == tree(whole), "wherever the prompts and sources stand"
    Image.open(inputs / "wide.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "square.png")
    (config.out / "result" / "both-1.png").unlink()
    before = tree(config.out)
    with pytest.raises(UserError, match=r"images of other settings \(sources: ") as error:
        draw_set(config)
    assert "\n" not in str(error.value) and tree(config.out) == before


def test_a_set_without_edits_is_claimed_as_ever(inputs, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    draw_set(replace(set_config(inputs, tmp_path / "set"), prompts=tmp_path / "prompts.txt"))
    assert "sources" not in json.loads((tmp_path / "set" / "sampling.json").read_text())


def command(inputs: Path, *arguments: str, ranks: int = 1) -> list[str]:
    return on_ranks("sample", "--run", str(inputs / "run"), *arguments, ranks=ranks)


@pytest.mark.parametrize("world", [2, 3, 9])
def test_any_number_of_ranks_gives_the_same_bytes(inputs, whole, companies, world, tmp_path) -> None:
    draw_set(set_config(inputs, tmp_path / "alone"))
    alone = companies.copy()
    companies.clear()
    config = set_config(inputs, tmp_path / "set")
    for rank in reversed(range(world)):  # rank 0, which writes the manifest when all are done, comes last
        draw_set(config, Team(rank, world))
    assert sorted(companies) == sorted(alone)
    assert tree(config.out) == tree(whole)


@pytest.mark.slow
def test_the_command_on_two_ranks_gives_the_bytes_of_one(inputs, whole, tmp_path) -> None:
    out = tmp_path / "set"
    options = ["--prompts", str(inputs / "prompts.jsonl"), "--out", str(out), "--batch-images", "3"]
    options += ["--num-images", "2", "--steps", "3", "--guidance", "2", "--source-guidance", "1.5"]
    result = subprocess.run(
        command(inputs, *options, ranks=2),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    assert f"{out}: 10 images" in printed and "3 euler steps, 3 evaluations" in printed
    assert all(f"rank {rank}: " in printed for rank in (0, 1)) and "ETA 0 s" in printed
    assert tree(out) == tree(whole)


def test_one_prompt_and_one_edit_are_drawn_to_a_file(inputs, tmp_path, monkeypatch) -> None:
    for number, options in enumerate(
        (
            ["--prompt", "two dogs", "--steps", "2", "--solver", "heun", "--num-images", "2"],
            ["--image", str(inputs / "wide.png"), "--instruction", "make it blue", "--renorm", "global"],
            [
                "--image",
                *[str(inputs / "wide.png")] * 2,
                "--instruction",
                "both",
                "--guidance-interval",
                "0.4",
                "1",
            ],
        )
    ):
        out = tmp_path / f"{number}.png"
        monkeypatch.setattr(sys, "argv", command(inputs, *options, "--out", str(out))[1:])
        assert entry.run(sample.main) == 0
        names = [f"{number}-0.png", f"{number}-1.png"] if number == 0 else [out.name]
        assert [Image.open(tmp_path / name).size for name in names] == [(32, 32)] * len(names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a", "--prompts", "b.txt"], "give one of"),
        (["--image", "a.png"], "give one of"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompt", "a", "--steps", "0"], "num_steps"),
        (["--prompt", " "], "empty"),
        (["--prompts", "prompts.jsonl", "--num-images", "0"], "at least 1"),
        (["--prompt", "a", "--num-images", "0"], "at least 1"),
        (["--prompts", "prompts.jsonl"], "give --out"),
        (["--prompt", "a", "--out", "folder"], "give an image file"),
        (["--prompt", "a", "--seed", "-1"], "seed -1"),
        (["--prompt", "a", "--seed", str(1 << 64)], "seed 18446744073709551616"),
    ],
)
def test_a_mistake_is_one_line(inputs, options, words, monkeypatch, capsys) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys, "argv", command(inputs, *options)[1:])
    assert entry.run(sample.main) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error


def evaluation_command(inputs: Path, folder: Path) -> list[str]:
    """Draws the set of `whole` and compares it with itself in the features of the autoencoder's encoder."""
    options = ["--images", folder / "set", "--out", folder / "out", "--reference", inputs / "whole"]
    options += ["--inception", "none", "--features", inputs / "autoencoder"]
    options += ["--run", inputs / "run", "--prompts", inputs / "prompts.jsonl", "--num-images", "2"]
    options += ["--steps", "3", "--guidance", "2", "--source-guidance", "1.5", "--batch-images", "3"]
    return [str(ROOT / "launch" / "evaluate.py"), "generation", *map(str, options)]


def test_a_run_is_drawn_and_scored_by_one_command(inputs, whole, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", evaluation_command(inputs, tmp_path))
    assert entry.run(launch_evaluate.main) == 0
    assert tree(tmp_path / "set") == tree(whole)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["n"] == 10 and scores["scores"]["precision_features"]["mean"] == 1
    assert "feature_distance: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_drawn_and_scored_on_two_ranks_to_the_bytes_of_one(
    inputs, whole, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "argv", evaluation_command(inputs, tmp_path / "one"))
    assert entry.run(launch_evaluate.main) == 0
    port = str(free_port())
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    subprocess.run(
        [*launcher, *evaluation_command(inputs, tmp_path / "two")],
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    for name in ("scores.json", "per_item.jsonl"):
        assert (tmp_path / "one" / "out" / name).read_bytes() == (
            tmp_path / "two" / "out" / name
        ).read_bytes()
