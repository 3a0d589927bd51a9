"""Ranks that would train together on different data, or from different weights, are told which."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.config import SetConfig
from data.plan.mixture import Mixture
from data.shards import Sample, ShardWriter
from launch.runs import input_fingerprints, nodes
from launch.runs.configs import ClassRun, GeneratorRun, TokenizerRun
from launch.runs.nodes import Report
from quickstart.train_judge import JudgeRun
from quickstart.train_standin import StandInRun

CONFIG = {
    "data": {"shards": "pixels"},
    "text_tokenizer": "tokenizer",
    "flow": {"init_from": "start"},
    "stage": {"perceptual": {"vgg16_weights": "vgg16.pt"}},
    "generator": {"init": "Qwen/Qwen2.5-0.5B"},
    "run_dir": "start",
}
WEIGHT_BYTES = 3 << 20  # more than is sampled


def write_host(host: Path) -> None:
    """What CONFIG names, the same on every host."""
    write_shards(host / "pixels", [b"a", b"b"])
    for name, content in {
        "tokenizer/text_tokenizer.model": b"pieces",
        "tokenizer/config.json": b"{}",
        "start/model.safetensors": bytes(WEIGHT_BYTES),
        "start/config.json": b"{}",
        "vgg16.pt": bytes(1000),
    }.items():
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).write_bytes(content)


def write_shards(folder: Path, payloads: list[bytes]) -> None:
    with ShardWriter(folder, max_samples_per_shard=2, source="test") as writer:
        for number, payload in enumerate(payloads):
            writer.write(Sample(f"k{number}", {"png": payload}))


def lines_of(first: Path, second: Path, monkeypatch: pytest.MonkeyPatch, **fingerprints: str) -> list[str]:
    """What is found where rank 0 sees one folder at the paths of CONFIG, rank 1 the other."""
    reports = []
    for rank, host in enumerate((first, second)):
        monkeypatch.chdir(host)
        objective: Any = SimpleNamespace(
            fingerprints=lambda rank=rank: fingerprints if rank else {"perceptual": "1"}
        )
        mixture = Mixture.open({"": SetConfig("pixels")})
        reports.append(
            Report(rank, f"node-{'ab'[rank]}", input_fingerprints.facts(CONFIG, mixture, objective))
        )
    return nodes.differences(reports)


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        write_host(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def test_hosts_with_the_same_files_start(hosts, monkeypatch) -> None:
    assert lines_of(*hosts, monkeypatch, perceptual="1") == []


def other_data(host: Path) -> None:
    for path in (host / "pixels").iterdir():
        path.unlink()
    write_shards(host / "pixels", [b"a", b"c"])


def changed(name: str, at: int) -> Callable[[Path], None]:
    def change(host: Path) -> None:
        content = bytearray((host / name).read_bytes())
        content[at] ^= 1
        (host / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("accident", "words"),
    [
        (other_data, "data shards (pixels) 2 samples, fingerprint "),
        (
            changed("tokenizer/text_tokenizer.model", 3),
            "text_tokenizer (tokenizer/text_tokenizer.model) 6 bytes",
        ),
        (
            changed("start/model.safetensors", -1),
            f"flow.init_from (start/model.safetensors) {WEIGHT_BYTES}",
        ),
        (changed("vgg16.pt", 500), "weights stage.perceptual.vgg16_weights (vgg16.pt) 1000 bytes"),
        (
            lambda host: (host / "start" / "config.json").unlink(),
            "weights flow.init_from (names in start) 1 files",
        ),
        (
            lambda host: (host / "start" / "more.json").touch(),
            "weights flow.init_from (names in start) 3 files",
        ),
        (
            lambda host: (host / "vgg16.pt").unlink(),
            "perceptual.vgg16_weights (vgg16.pt) none where node-a",
        ),
    ],
)
def test_what_differs_is_named_with_its_host(hosts, monkeypatch, accident, words) -> None:
    accident(hosts[1])
    lines = lines_of(*hosts, monkeypatch, perceptual="1")
    assert len(lines) == 1 and lines[0].startswith("node-b (rank 1): ") and words in lines[0], lines
    assert lines[0].endswith("to every node")


def test_frozen_networks_from_elsewhere_are_compared_by_what_was_loaded(hosts, monkeypatch) -> None:
    (line,) = lines_of(*hosts, monkeypatch, perceptual="2")
    assert line.startswith("node-b (rank 1): weights perceptual 2 where node-a has 1; ")


def test_of_gigabytes_a_sample_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert dict(input_fingerprints._samples(path))[str(path)].startswith(f"{1 << 40} bytes, ")


NO_INPUTS = {
    "run_dir": "compared by nodes.not_shared",
    "cache_dir": "each node has its own",
    "quarantine": "in the fingerprint of its set",
    "name": "of an architecture",
    "overrides": "of an architecture",
    "suites": "names",
    "caption_weights": "names",
}


@pytest.mark.parametrize("run", [TokenizerRun, GeneratorRun, ClassRun, StandInRun, JudgeRun])
def test_every_text_of_a_config_is_compared_or_is_no_input(run: type) -> None:
    names = set(texts(run))
    assert names and names <= input_fingerprints.NAMED_BY | NO_INPUTS.keys() | {"mixture"}


def texts(kind: Any, name: str = "") -> Iterator[str]:
    """Names of the fields below a dataclass that hold free text."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            yield from texts(hints[field.name], field.name)
    elif kind in (str, Path):
        yield name
    elif typing.get_origin(kind) is not typing.Literal:
        for argument in typing.get_args(kind):
            yield from texts(argument, name)
