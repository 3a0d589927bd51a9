"""A finished run becomes a folder that draws the same images, with a card that tells what the run was."""

from __future__ import annotations

import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from base import config
from base.config import UserError, to_dict
from base.files import write_json
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import LatentInfo
from generator.model import Generator
from generator.model_card import Card, model_card
from generator.pipeline import Pipeline
from generator.pretrained import PATTERNS, load_pretrained
from generator.sampling_config import SamplingConfig
from launch import export
from launch.runs import entry, export_folder
from launch.runs.configs import GeneratorRun
from tokenizer.export import fingerprint
from tokenizer.kl import KlAutoencoder, KlConfig

ROOT = Path(__file__).parents[3]
METRICS = [
    {"step": 10, "loss": 0.5, "tokens": 1000, "samples": 10},
    {"step": 20, "loss": None, "tokens": 1100, "samples": 11},
    {"step": 30, "loss": 0.25, "tokens": 1200, "samples": 12},
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an untrained generator, with its autoencoder and text tokenizer."""
    root = tmp_path_factory.mktemp("export")
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], root / "text", 400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = KlAutoencoder(KlConfig(32, 4, (32, 32)))
    autoencoder.save(root / "autoencoder")
    overrides = [
        f"run_dir={root / 'run'}",
        f"autoencoder={root / 'autoencoder'}",
        f"text_tokenizer={root / 'text'}",
        f"data.shards={root / 'latents'}",
        "generator.backbone.width=32",
        "generator.max_side=16",
        "packing.max_side=16",
        "preview_sampling.num_steps=2",
        "flow.time_shift=3",
    ]
    run = config.load(GeneratorRun, ROOT / "configs" / "quickstart" / "t2i.yaml", overrides)
    fingerprints = fingerprint(root / "autoencoder"), load_text_tokenizer(str(root / "text")).fingerprint
    latents = LatentInfo("fp32", autoencoder.latent_shape, (0.0,) * 4, (1.0,) * 4, *fingerprints)
    model = Generator.create(run.generator, latents, seed=0)
    torch.nn.init.normal_(model.latent_out.weight, generator=torch.Generator().manual_seed(1))
    (root / "run" / "export").mkdir(parents=True)
    model.save(root / "run" / "export")
    write_json(root / "run" / "config.json", to_dict(run))
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    return root / "run"


def run_export(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, out: Path, *more: str, name: str = "me/apples"
) -> int:
    words = ["--run", str(run_dir), "--name", name, "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["export", *words])
    return entry.run(export.main)


@pytest.fixture
def folder(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert run_export(monkeypatch, run_dir, tmp_path / "folder") == 0
    return tmp_path / "folder"


def test_the_folder_draws_what_the_run_draws(run_dir, folder) -> None:
    own = Pipeline.load(run_dir / "export", run_dir.parent / "autoencoder", run_dir.parent / "text")
    pipeline, sampling = load_pretrained(folder)
    assert (sampling.num_steps, sampling.time_shift) == (2, 3)
    drawn = [
        np.asarray(one.generate(["a red apple"], seeds=[5], sampling=sampling)[0]) for one in (own, pipeline)
    ]
    assert np.array_equal(*drawn) and drawn[0].std() > 0


def test_the_folder_holds_tensors_and_text_alone(folder) -> None:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "autoencoder/config.json",
        "autoencoder/model.safetensors",
        "generator/config.json",
        "generator/model.safetensors",
        "sampling.json",
        "text_tokenizer/config.json",
        "text_tokenizer/text_tokenizer.model",
    ]


def test_a_name_on_the_hub_is_fetched_without_what_is_not_read(folder, monkeypatch, tmp_path) -> None:
    (folder / "generator" / "weights.bin").write_bytes(b"pickle")

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("me/apples", "v1")
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            if any(relative.match(pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tmp_path / "cache" / relative)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_pretrained("me/apples", revision="v1")
    assert not (tmp_path / "cache" / "generator" / "weights.bin").exists()


def test_a_name_that_cannot_be_had_is_one_line(monkeypatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'me/apples': no such folder, .*\(no network\)"):
        load_pretrained("me/apples")


def test_the_card_tells_what_the_run_was(folder, run_dir) -> None:
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "other",
        "library_name": "rpiae",
        "pipeline_tag": "text-to-image",
        "tags": ["rpiae", "flow-matching", "mixture-of-transformers"],
    }
    run = config.from_dict(GeneratorRun, json.loads((run_dir / "config.json").read_text()))
    for fact in (
        "# apples",
        "- data: latents (not at hand when this was written)",
        "- steps: 30",
        "- tokens: 3,300",
        "- samples: 33",
        "- loss, mean of the last 2 log lines: 0.3750",
        f'"lr": {run.engine.optimizer.lr}',
        fingerprint(run_dir.parent / "autoencoder"),
        '"num_steps": 2',
        "- time shift: 3",
        'load_pretrained("me/apples", device="cuda")',
    ):
        assert fact in text, fact
    assert str(run_dir.parent) not in card, "a path of this machine"


def test_the_code_of_the_card_runs(folder, monkeypatch, tmp_path) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    monkeypatch.chdir(tmp_path)
    code = code.replace('"me/apples"', repr(str(folder))).replace('device="cuda"', 'device="cpu"')
    exec(compile(code, "card", "exec"), {})  # noqa: S102  # the lines that we wrote into the card
    assert (tmp_path / "result.png").is_file()


def test_a_card_of_an_edit_names_its_start_and_base_model(run_dir) -> None:
    model = Generator.load(run_dir / "export")
    shaped = config.from_dict(type(model.config), {**to_dict(model.config), "init": "qwen:Qwen/Qwen2.5-0.5B"})
    model.config = shaped
    card = Card(
        name="me/edits",
        task="edit",
        license="apache-2.0",
        data=["omniedit"],
        optimizer={},
        steps=5,
        metrics=[],
        started_from="t2i",
        commit=None,
    )
    text = model_card(card, model, SamplingConfig())
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-0.5B" and front["pipeline_tag"] == "image-to-image"
    assert "- started from: t2i" in text and "pipeline.edit(" in text
    assert "tokens:" not in text and "commit" not in text and "loss" not in text


def test_a_text_tokenizer_of_transformers_keeps_its_fingerprint(tmp_path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=[
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
        ],  # the others are added when it is read
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["a red apple on blue"], trainer)
    Qwen2TokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path / "qwen")
    export_folder.copy_text_tokenizer(str(tmp_path / "qwen"), tmp_path / "copy")
    before, after = (load_text_tokenizer(str(tmp_path / name)) for name in ("qwen", "copy"))
    assert before.fingerprint == after.fingerprint
    wanted = {path.name for path in (tmp_path / "copy").iterdir()}
    read = {name for name in wanted if any(fnmatch(f"text_tokenizer/{name}", part) for part in PATTERNS)}
    assert read == wanted, "a name on the hub is fetched without these"


def test_an_unfinished_run_and_a_full_folder_are_refused(run_dir, monkeypatch, tmp_path, capsys) -> None:
    (tmp_path / "unfinished").mkdir()
    assert run_export(monkeypatch, tmp_path / "unfinished", tmp_path / "out") == 2
    assert "no export folder" in capsys.readouterr().err
    assert run_export(monkeypatch, run_dir, run_dir) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (run_dir / "config.json").exists()


def test_a_name_that_the_hub_would_refuse_is_refused_before(run_dir, monkeypatch, tmp_path, capsys) -> None:
    for name in ("apples", "me/red apples", "me/a/b", ""):
        assert run_export(monkeypatch, run_dir, tmp_path / "out", name=name) == 2
        assert "give OWNER/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_card_shows_the_end_of_a_path_of_this_machine_alone(run_dir, monkeypatch, tmp_path) -> None:
    other = shutil.copytree(run_dir, tmp_path / "run")
    tree = json.loads((other / "config.json").read_text())
    tree["flow"]["init_from"] = "/home/me/runs/t2i/export"
    write_json(other / "config.json", tree)
    assert run_export(monkeypatch, other, tmp_path / "out") == 0
    assert "- started from: t2i/export" in (tmp_path / "out" / "README.md").read_text()


def test_parts_that_do_not_belong_together_are_not_written(run_dir, monkeypatch, tmp_path, capsys) -> None:
    other = shutil.copytree(run_dir, tmp_path / "run")
    tree = json.loads((other / "config.json").read_text())
    autoencoder = KlAutoencoder(KlConfig(32, 4, (32, 32)))
    autoencoder.save(tmp_path / "another")
    write_json(other / "config.json", {**tree, "autoencoder": str(tmp_path / "another")})
    assert run_export(monkeypatch, other, tmp_path / "out") == 2
    assert "was trained with another autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def another_run(run_dir: Path, copy: Path, **changed: object) -> Path:
    """A copy of the run whose config.json says something else."""
    shutil.copytree(run_dir, copy)
    write_json(copy / "config.json", {**json.loads((run_dir / "config.json").read_text()), **changed})
    return copy


def test_the_card_follows_the_task_that_the_run_folder_records(run_dir, monkeypatch, tmp_path) -> None:
    edit = another_run(run_dir, tmp_path / "run", task="edit")
    assert run_export(monkeypatch, edit, tmp_path / "folder") == 0
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "pipeline.edit(" in card


def test_another_task_than_the_recorded_one_is_refused(run_dir, monkeypatch, tmp_path, capsys) -> None:
    assert run_export(monkeypatch, run_dir, tmp_path / "folder", "--task", "edit") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--task edit: {run_dir} was trained for t2i" in line
    assert not list(tmp_path.iterdir())


def test_of_a_folder_without_a_record_the_task_is_asked_for(run_dir, monkeypatch, tmp_path, capsys) -> None:
    old = another_run(run_dir, tmp_path / "run")
    tree = json.loads((old / "config.json").read_text())
    del tree["task"]
    write_json(old / "config.json", tree)
    assert run_export(monkeypatch, old, tmp_path / "folder") == 2
    assert "does not say what was trained; give --task t2i or --task edit" in capsys.readouterr().err
    assert run_export(monkeypatch, old, tmp_path / "folder", "--task", "edit") == 0
    assert "pipeline_tag: image-to-image" in (tmp_path / "folder" / "README.md").read_text()
