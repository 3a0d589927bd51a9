"""engine.deterministic: what it switches on, before what, and for whom it is refused."""

import os
from types import SimpleNamespace

import pytest
import torch

from base.config import UserError
from engine.determinism import make_deterministic
from launch.runs import training
from launch.runs.configs import PixelRun


@pytest.fixture
def restored(monkeypatch):
    """Switches as they were, and an environment without wishes."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("restored")
def test_what_is_switched_on() -> None:
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":4096:8", "Ring")


@pytest.mark.usefixtures("restored")
def test_what_the_environment_says_is_kept(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    make_deterministic()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["NCCL_ALGO"]) == (":16:8", "Tree")


def test_an_environment_that_forbids_it_is_named(monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0.*make it :4096:8 or :16:8"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()


class RanksMeetError(Exception):
    pass


@pytest.mark.parametrize("asked", [False, True])
def test_a_training_switches_before_its_ranks_meet(asked, monkeypatch) -> None:
    switched = []

    def meet(*_arguments: object) -> None:
        raise RanksMeetError

    monkeypatch.setattr(training, "make_deterministic", lambda: switched.append(True))
    monkeypatch.setattr(training.periodic_scores, "start_of", lambda _run: None)
    monkeypatch.setattr(training, "_start_ranks", meet)
    run = SimpleNamespace(engine=SimpleNamespace(deterministic=asked, wandb="disabled"), run_dir="nowhere")
    with pytest.raises(RanksMeetError):
        training._train(run, None, None, None)
    assert switched == [True] * asked


def test_a_training_on_pixels_is_refused_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = PixelRun("nowhere", None, None, SimpleNamespace(deterministic=True, wandb="disabled"))
    with pytest.raises(UserError, match="max pooling and of bicubic resizing"):
        training._train(run, None, None, None)


@pytest.mark.parametrize(
    ("cuda", "precision", "backend", "expected"),
    [
        (False, "bf16", "auto", True),
        (True, "fp32", "auto", True),
        (True, "bf16", "sdpa", True),
        (True, "bf16", "auto", False),
        (True, "bf16_autocast", "flash2", False),
    ],
)
def test_the_packer_pads_for_sdpa_alone(cuda, precision, backend, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    # As on a GPU with every kernel there is.
    monkeypatch.setattr(
        "generator.attention.why_not",
        lambda _name, device, dtype, _head_dim: (
            None if device.type == "cuda" and dtype == torch.bfloat16 else "no"
        ),
    )
    run = SimpleNamespace(
        engine=SimpleNamespace(precision=precision),
        flow=SimpleNamespace(attention_backend=backend),
        generator=SimpleNamespace(backbone=SimpleNamespace(head_dim=64)),
    )
    assert training._runs_sdpa(run) == expected
