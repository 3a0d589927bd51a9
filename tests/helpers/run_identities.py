"""Rows of the table of identities: a training's inputs, nodes and checkpoints, and the steps of the miniature."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from base import files
from data.config import SetConfig
from data.plan.mixture import Mixture
from data.plan.stream import PackStream
from engine import checkpoint_folder, checkpoint_writer, config_changes, logs
from helpers.data_identities import shards, write_files
from helpers.identities import Identity, fields_identity
from helpers.stages import VIT
from launch.runs import input_fingerprints, nodes
from quickstart import steps
from quickstart.config import JudgeConfig, StandInConfig
from quickstart.judge import Judge, JudgeObjective
from quickstart.judge_network import JudgeNetwork, SceneClasses
from quickstart.pictures import source as pictures
from quickstart.pictures.config import EmojiConfig
from quickstart.standin import IdentityObjective
from quickstart.steps import Step
from quickstart.suites.class_images import EmojiClassSuite
from quickstart.suites.edits import EmojiEditSuite
from quickstart.suites.text_to_image import EmojiT2ISuite


def inputs_of(
    folder: Path, payloads: dict[str, bytes], left_out: str, start: dict[str, bytes], weights: Any, lr: float
) -> object:
    """What ranks compare of a run's inputs, without the paths."""
    shards(folder / "pixels", payloads)
    write_files(folder / "start", start)
    (folder / "q.jsonl").write_text(json.dumps({"key": left_out, "reason": "bad"}))
    objective: Any = SimpleNamespace(fingerprints=lambda: weights)
    mixture = Mixture.open({"": SetConfig(str(folder / "pixels"), quarantine=str(folder / "q.jsonl"))})
    config = {"flow": {"init_from": str(folder / "start")}, "engine": {"lr": lr}}
    found = input_fingerprints.facts(config, mixture, objective)
    return {
        kind: {name.replace(str(folder), ""): value for name, value in facts.items()}
        for kind, facts in found.items()
    }


LARGE = bytes(3 << 20)
PAYLOADS = {"a": b"1", "b": b"2"}
INPUTS: dict[str, Any] = {
    "payloads": PAYLOADS,
    "left_out": "a",
    "start": {"model.safetensors": LARGE, "config.json": b"{}"},
    "weights": {"perceptual": "1"},
    "lr": 1.0,
}


def sampled(folder: Path, first: int, last: int, size: int, middle: int, name: str = "x") -> str:
    payload = bytes([first]) + bytes(size // 2) + bytes([middle]) + bytes(size // 2) + bytes([last])
    return input_fingerprints._sample(write_files(folder, {name: payload}) / name)


def sources(folder: Path, code: bytes, notes: bytes) -> object:
    return nodes.source_hashes(write_files(folder, {"base/x.py": code, "base/notes.txt": notes}))


def process_facts(folder: Path, version: str, source: str, config: Any) -> object:
    with (
        mock.patch.object(nodes, "versions", lambda: {"torch": version}),
        mock.patch.object(nodes, "source_hashes", lambda _: {"x.py": source}),
    ):
        return nodes.facts(config)


def agree(folder: Path, other: Any) -> list[str]:
    """The differences that rank 0 finds between its facts and another rank's."""
    own = {"data": {"a": "1"}, "weights": {"b": "2"}}
    values = iter(
        [
            [files.digest(own), files.digest(other)],
            [nodes.Report(0, "node-a", own), nodes.Report(1, "node-b", other)],
        ]
    )
    ranks: Any = SimpleNamespace(rank=0, gather=lambda _: next(values))
    return nodes.compare(ranks, own)


def step_identity(folder: Path, config: str, settings: Any, about: str, arguments: str, first: str) -> object:
    """What a step that follows another is done with."""
    path = folder / "run.yaml"
    path.write_text(config)
    given = [
        Step(first, "", lambda: None),
        Step("second", about, ["/bin/python", "x.py", arguments], ("run.yaml",), settings),
    ]
    with (
        mock.patch.object(steps, "_work"),
        mock.patch.object(steps, "say"),
        mock.patch.object(steps, "resolve", lambda name: files.read_json(folder / name)),
    ):
        steps.run_steps(folder / "chain", given)
    return steps.identity_of(folder / "chain", "second")


def state_digest(folder: Path, **state: Any) -> str:
    folder.mkdir(exist_ok=True)
    checkpoint_folder.write_state(folder, state)
    return str(files.read_json(folder / checkpoint_folder.STATE)["digest"])


def is_whole(folder: Path, payload: bytes, expected: bytes) -> str:
    """What is wrong with a rank's file of a checkpoint whose sum is that of `expected`."""
    (folder / "x").write_bytes(payload)
    total = checkpoint_folder.Sum(len(expected), zlib.crc32(expected))
    return checkpoint_writer.checked(folder / "x", total)


def wandb_id(folder: Path, run_dir: str, name: str, config: Any) -> object:
    wandb = mock.MagicMock()
    with mock.patch.dict("sys.modules", wandb=wandb):
        logs._start_wandb(Path(run_dir), name, config, "offline")
    return wandb.init.call_args.kwargs["id"]


def position(folder: Path, payloads: dict[str, bytes], seed: int, num_streams: int, budget: int) -> object:
    """What a resumed run compares of its data, without the cursors."""
    packer: Any = SimpleNamespace(
        budget=budget, lengths=lambda dataset: torch.ones(len(dataset)).long().numpy()
    )
    stream: Any = SimpleNamespace(
        _mixture=Mixture.open({"": SetConfig(str(shards(folder / "pixels", payloads)))}),
        _seed=seed,
        num_streams=num_streams,
        _packer=packer,
        _saved={},
    )
    return PackStream.state_dict(stream)


CLASSES = SceneClasses(("cat", "dog"), ("sea",))


def emoji(folder: Path, recipe: int, name: str, **config: Any) -> str:
    with mock.patch.object(pictures, "RECIPE", recipe):
        return pictures.EmojiSource(EmojiConfig(**config), name, 4).description


def class_suite(folder: Path, judge: str, features: str) -> object:
    made_by: Any = [SimpleNamespace(fingerprint=name, protocol={}) for name in (judge, features)]
    real: Any = SimpleNamespace(items=(), directory=folder)
    with mock.patch.object(EmojiClassSuite, "_statistics"):
        return EmojiClassSuite(*made_by, real).fingerprints


def judge(folder: Path, classes: SceneClasses, seed: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Judge(classes, JudgeNetwork(JudgeConfig((8, 8, 8)), CLASSES)).fingerprint


EMOJI = {field.name: getattr(EmojiConfig(), field.name) for field in dataclasses.fields(EmojiConfig)}
STATE = {"step": 1, "num_ranks": 2, "files": {"a": {"bytes": 1, "crc32": 2}}, "fingerprints": {"start": "a"}}
RUNS: tuple[Identity, ...] = (
    Identity(
        "launch.runs.input_fingerprints.facts",
        inputs_of,
        INPUTS,
        {
            "payloads": {"a": b"1", "b": b"3"},
            "left_out": "b",
            "start": {"model.safetensors": LARGE[:-1] + b"x", "config.json": b"{}"},
            "weights": {"perceptual": "2"},
        },
        {"settings that name no file": {"lr": 2.0}},
        through=["launch.runs.input_fingerprints._samples"],
    ),
    Identity(
        "launch.runs.input_fingerprints._sample",
        sampled,
        {"first": 1, "last": 2, "size": 1000, "middle": 3, "name": "x"},
        {"first": 2, "last": 1, "size": 1002, "middle": 4},
        {"the file's name": {"name": "y"}},
    ),
    Identity(
        "launch.runs.nodes.source_hashes",
        sources,
        {"code": b"a = 1", "notes": b"x"},
        {"code": b"a = 2"},
        {"files without code": {"notes": b"y"}},
    ),
    Identity(
        "launch.runs.nodes.facts",
        process_facts,
        {"version": "1", "source": "a", "config": {"a": {"b": 1}}},
        {"version": "2", "source": "b", "config": {"a": {"b": 2}}},
    ),
    Identity(
        "launch.runs.nodes.compare",
        agree,
        {"other": {"weights": {"b": "2"}, "data": {"a": "1"}}},
        {"other": {"weights": {"b": "3"}, "data": {"a": "1"}}},
    ),
    Identity(
        "quickstart.steps.run_steps",
        step_identity,
        {
            "config": '{"a": 1, "b": 2}',
            "settings": [1],
            "about": "x",
            "arguments": "--fast",
            "first": "first",
        },
        {"config": '{"a": 1, "b": 3}', "settings": [2], "arguments": "--slow", "first": "other"},
        {"its description": {"about": "y"}, "the order in a config": {"config": '{"b": 2, "a": 1}'}},
        through=["quickstart.steps.identity_of"],
    ),
    Identity(
        "engine.checkpoint_folder.write_state",
        state_digest,
        STATE,
        {"step": 2, "num_ranks": 3, "files": {"a": {"bytes": 1, "crc32": 3}}, "fingerprints": {"start": "b"}},
        through=["engine.checkpoint_folder.read_state"],
    ),
    Identity(
        "engine.checkpoint_writer.checked",
        is_whole,
        {"payload": b"abc", "expected": b"abc"},
        {"payload": b"abd", "expected": b"abcd"},
    ),
    Identity(
        "engine.config_changes.changes",
        lambda folder, before, now: config_changes.changes(before, now),
        {"before": {"a": {"b": 1}}, "now": {"a": {"b": 1}}},
        {"before": {"a": {"b": 2}}, "now": {"a": {"b": 1, "c": 1}}},
    ),
    Identity(
        "engine.logs._start_wandb",
        wandb_id,
        {"run_dir": "/runs/a", "name": "a", "config": {}},
        {"run_dir": "/other/a"},
        {"the config of a start": {"config": {"a": 1}}, "the run's name": {"name": "b"}},
    ),
    Identity(
        "data.plan.stream.PackStream.state_dict",
        position,
        {"payloads": PAYLOADS, "seed": 0, "num_streams": 2, "budget": 4},
        {"payloads": {"a": b"1", "b": b"3"}, "seed": 1, "num_streams": 1, "budget": 8},
    ),
    Identity(
        "quickstart.pictures.source.EmojiSource.description",
        emoji,
        {"recipe": 1, "name": "scenes-train", **EMOJI},
        {
            "recipe": 2,
            "name": "scenes-validation",
            **{field: value + 1 for field, value in EMOJI.items()},
        },
    ),
    Identity(
        "quickstart.judge.Judge.fingerprint",
        judge,
        {"classes": CLASSES, "seed": 0},
        {"classes": SceneClasses(("dog", "cat"), ("sea",)), "seed": 1},
        through=["quickstart.judge.Judge.__init__"],
    ),
    fields_identity(
        "quickstart.judge.JudgeObjective.fingerprints",
        JudgeConfig(),
        lambda config: JudgeObjective(config, CLASSES).fingerprints(),
        {"channels": (8, 8, 8), "seed": 1},
    ),
    Identity(
        "quickstart.judge.JudgeObjective.fingerprints",
        lambda folder, classes: JudgeObjective(JudgeConfig((8, 8, 8)), classes).fingerprints(),
        {"classes": CLASSES},
        {"classes": SceneClasses(("dog", "cat"), ("sea",))},
    ),
    fields_identity(
        "quickstart.standin.IdentityObjective.fingerprints",
        StandInConfig(VIT, 4),
        lambda config: IdentityObjective(config).fingerprints(),
        {
            "representation": dataclasses.replace(VIT, overrides={**VIT.overrides, "depth": 2}),
            "num_classes": 5,
            "pixel_weight": 1.0,
            "seed": 1,
        },
    ),
    *(
        Identity(
            f"quickstart.suites.{name}.fingerprints",
            lambda folder, judge, kind=kind: kind(SimpleNamespace(fingerprint=judge)).fingerprints,
            {"judge": "a"},
            {"judge": "b"},
        )
        for name, kind in (
            ("edits.EmojiEditSuite", EmojiEditSuite),
            ("text_to_image.EmojiT2ISuite", EmojiT2ISuite),
        )
    ),
    Identity(
        "quickstart.suites.class_images.EmojiClassSuite.fingerprints",
        class_suite,
        {"judge": "a", "features": "b"},
        {"judge": "c", "features": "d"},
    ),
)
