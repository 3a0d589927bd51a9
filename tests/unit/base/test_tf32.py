"""Where GPUs may multiply in TF32: in every command, as the config says in a training, never in a score."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from base.tf32 import allow_tf32, exact_fp32
from data.image_set import Item, write_image, write_manifest
from engine import loop
from engine.distributed import Ranks
from engine.engine_config import EngineConfig, OptimizerConfig
from evaluation.features.interface import extract
from evaluation.runner import Measurement, evaluate
from launch.runs import entry

REPOSITORY = Path(__file__).parents[3]


def state() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = state()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_every_command_allows_it() -> None:
    seen = []

    def command() -> None:
        entry.use_torch()
        seen.append(state())

    for before in (True, False):
        allow_tf32(before)
        entry.run(command)
    assert seen == [(True, True)] * 2
    programs = [path for path in (REPOSITORY / "launch").glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) > 15
    assert [path.name for path in programs if not re.search(r"entry\.run\(main", path.read_text())] == []
    body = (REPOSITORY / "launch/runs/tasks.py").read_text()  # of train_*.py
    assert "entry.use_torch()" in body
    texts = {path.name: path.read_text() for path in programs}
    without = [
        name for name, text in texts.items() if not re.search(r"entry\.use_torch\(\)|tasks\.main\(", text)
    ]
    assert without == ["train_text_tokenizer.py"]  # which needs no torch


@pytest.mark.parametrize("wanted", [True, False])
def test_a_training_follows_its_config(wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before anything of the training is on the device."""
    seen: list[tuple[bool, bool]] = []

    class Objective:
        def to(self, device: torch.device) -> None:
            seen.append(state())
            raise InterruptedError

    monkeypatch.setattr("engine.communication.time_collectives", lambda spans: None)
    config = EngineConfig(steps=1, optimizer=OptimizerConfig(lr=1.0), tf32=wanted)
    ranks = Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    allow_tf32(not wanted)
    with pytest.raises(InterruptedError):
        loop._Run(Objective(), None, config, tmp_path, {}, ranks)  # type: ignore[arg-type]
    assert seen == [(wanted, wanted)]


def test_scores_and_features_are_exact_and_what_was_allowed_comes_back(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Suite:
        name, roles, protocol, fingerprints = "s", ("result",), {}, {}  # type: ignore[var-annotated]

        def measure(self, images: Any, items: Any) -> list[Measurement]:
            seen.append(state())
            return [Measurement({"x": 1.0}) for _ in items]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(state())
        return torch.zeros(len(pixels), 2)

    write_image(tmp_path / "0.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    write_manifest(tmp_path, [Item("0", {"result": "0.png"}, {})])
    allow_tf32(True)
    evaluate(Suite(), tmp_path, tmp_path / "out")  # type: ignore[arg-type]
    extract(features, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))  # type: ignore[arg-type]
    assert seen == [(False, False)] * 2 and state() == (True, True)
    with pytest.raises(ValueError, match="broken"), exact_fp32():
        raise ValueError("broken")
    assert state() == (True, True)


def test_products_on_the_cpu_stay_as_they_are() -> None:
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    results = []
    for allowed in (False, True):
        allow_tf32(allowed)
        results.append((x @ w, torch.nn.functional.conv2d(x[None, None], w[None, None, :3, :3])))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
