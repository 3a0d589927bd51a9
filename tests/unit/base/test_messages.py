"""Messages name what their reader typed, and a remedy that exists where it stands."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from base.config import UserError, counted
from data.shards import LatentInfo
from engine.peers import lost_contact
from evaluation.metrics.reconstruction import Lpips
from generator.config import FlowConfig, GeneratorConfig, MotConfig
from generator.objective import build_objective
from launch.runs.drawable import check_edits
from tokenizer.training.perceptual import build_perceptual
from tokenizer.training.stage_config import PerceptualConfig
from tokenizer.weights import usable


def test_a_number_and_its_noun_agree() -> None:
    assert [counted(n, "GPU") for n in (0, 1, 2, 1024)] == ["0 GPUs", "1 GPU", "2 GPUs", "1,024 GPUs"]


def test_missing_vgg_weights_are_told_with_the_option_of_who_asks(tmp_path: Path) -> None:
    missing = str(tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"give torchvision's .pth as --vgg16 FILE") as scoring:
        Lpips.load(missing)
    with pytest.raises(UserError, match=r"set stage.perceptual.vgg16_weights") as training:
        build_perceptual(PerceptualConfig(vgg16_weights=missing))
    assert "perceptual" not in str(scoring.value) and "--vgg16" not in str(training.value)


def test_a_device_that_is_not_here_is_one_line() -> None:
    assert usable("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu", "mps"):
        with pytest.raises(UserError, match=f"device '{name}' cannot be used here") as error:
            usable(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 260


def test_too_small_a_vocabulary_is_told_by_its_whole_key() -> None:
    class Many:
        vocab_size, fingerprint = 100, "text"

    latents = LatentInfo("fp32", (4, 2, 2), (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")
    backbone = MotConfig(
        vocab_size=50, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=8
    )
    with pytest.raises(
        UserError, match=r"^generator\.backbone\.vocab_size 50 is less than the text tokenizer's 100"
    ):
        build_objective("t2i", GeneratorConfig(backbone, max_side=4), FlowConfig(), latents, Many(), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("task", "refuses"), [("t2i", True), ("edit", False)])
def test_only_an_editing_run_edits(tmp_path: Path, task: str, refuses: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task": task}))
    refusal = pytest.raises(UserError, match=r"has never seen a source.*launch/train_edit\.py")
    with refusal if refuses else contextlib.nullcontext():
        check_edits(tmp_path)


@pytest.mark.parametrize("local", ["2", "1"])
def test_a_rank_that_vanishes_on_one_host_is_no_fault_of_a_hostfile(
    monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", local)
    error = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:29500 gloo")
    found = lost_contact(error)
    assert found is not None
    assert ("hostfile" in str(found)) == (local == "1") and ("dmesg" in str(found)) == (local == "2")
