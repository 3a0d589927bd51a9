"""Exports, checkpoints, text tokenizers, weights of others and configs, for the fuzz run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models

from base import config, files
from base.config import UserError
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from engine import checkpoint_export, checkpoint_folder, checkpoint_writer
from engine.layout import Segment
from integration.scripts.fuzz_inputs import Case, put
from launch.runs.configs import EncodeRun
from launch.runs.tasks import read_run
from quickstart.config import JudgeConfig
from quickstart.judge import Judge, JudgeExport
from quickstart.judge_network import JudgeNetwork, SceneClasses
from quickstart.train_judge import JudgeRun
from quickstart.train_standin import StandInRun
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.weights import write_tensors
from unit.base.test_strange_exports import EXPORTS

ROOT = Path(__file__).parents[3]


def checkpoint(folder: Path) -> None:
    model = torch.nn.Linear(3, 2)
    directory = folder / "step_00000003"
    directory.mkdir()
    shapes = {f"module.{name}": list(parameter.shape) for name, parameter in model.named_parameters()}
    flats = [
        checkpoint_writer.Flat(
            "main/master", parameter.detach().flatten(), [Segment(f"module.{name}", 0, parameter.numel(), 0)]
        )
        for name, parameter in model.named_parameters()
    ]
    total = checkpoint_writer.write(directory / checkpoint_folder.file_name(0), flats)
    checkpoint_folder.write_state(
        directory,
        {
            "format": checkpoint_folder.FORMAT,
            "step": 3,
            "num_ranks": 1,
            "ema_decays": [],
            "fingerprints": {"data": "a"},
            "engines": {"main": {"shapes": shapes}},
            "files": {checkpoint_folder.file_name(0): {"bytes": total.num_bytes, "crc32": total.crc32}},
        },
    )


def sign_checkpoint(folder: Path) -> None:
    for path in folder.glob("*/state.json"):
        state = json.loads(path.read_bytes())
        for name, entry in state["files"].items():
            content = (path.parent / name).read_bytes()
            entry |= {"bytes": len(content), "crc32": checkpoint_writer.isal_zlib.crc32(content)}
        checkpoint_folder.write_state(path.parent, state)


def judge_export(folder: Path) -> None:
    network, classes = JudgeConfig((8, 8, 8)), SceneClasses(("apple", "dog"), ("red", "blue"))
    files.write_json(folder / "config.json", config.to_dict(JudgeExport(network, classes)))
    write_tensors(folder / "model.safetensors", JudgeNetwork(network, classes))


def torch_file(folder: Path) -> None:
    torch.save(
        {"ema": {"module.a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}, "step": 7},
        folder / "a.pt",
    )


def text_model(folder: Path) -> None:
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], folder / "text", 400)


def fast_tokenizer(folder: Path) -> None:
    """As Qwen's folder is, with six pieces."""
    vocabulary = {piece: number for number, piece in enumerate(("a", "d", "o", "g", "do", "dog", "\u0120"))}
    model = models.BPE(vocab=vocabulary, merges=[("d", "o"), ("do", "g")])
    (folder / "text").mkdir()
    Tokenizer(model).save(str(folder / "text" / "tokenizer.json"))
    files.write_json(
        folder / "text" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
    )


def read_checkpoints(folder: Path) -> None:
    directory, state = checkpoint_export.find(folder, "latest")
    checkpoint_export.load(directory, state, torch.nn.Linear(3, 2), None)


CONFIGS = {
    "tokenizer/pivot.yaml": read_run,
    "tokenizer/decoder.yaml": read_run,
    "generator/edit_omniedit.yaml": read_run,
    "generator/class/ditdh_raw_adaptive.yaml": read_run,
    "latents/cc12m.yaml": lambda path: config.load(EncodeRun, path).configs(),
    "quickstart/standin.yaml": lambda path: config.load(StandInRun, path),
    "quickstart/judge.yaml": lambda path: config.load(JudgeRun, path),
}


def configs(folder: Path) -> None:
    found = {name: ROOT / "configs" / name for name in CONFIGS}
    for name, path in found.items():
        if path.is_file():
            put(folder, {name: yaml.safe_dump(config.resolve(path))})


def read_configs(folder: Path) -> None:
    for name, read in CONFIGS.items():
        if (folder / name).is_file():
            with contextlib.suppress(UserError):  # one file is changed, and all are read
                read(str(folder / name))


CASES: dict[str, Case] = {
    **{f"export {name}": Case(save, load) for name, (save, load) in EXPORTS.items()},
    "judge's export": Case(judge_export, Judge.load),
    "text tokenizer": Case(
        text_model, lambda folder: load_text_tokenizer(str(folder / "text")).encode("a dog")
    ),
    "text tokenizer of transformers": Case(
        fast_tokenizer, lambda folder: load_text_tokenizer(str(folder / "text")).encode("a dog")
    ),
    "checkpoint": Case(checkpoint, read_checkpoints, sign=sign_checkpoint),
    "torch file": Case(torch_file, lambda folder: read_checkpoint(folder / "a.pt")),
    "configs": Case(configs, read_configs),
}
