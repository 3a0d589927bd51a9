"""What a graph keeps of a velocity: recorded at one time and place, it is right at every other.

A CUDA graph replays kernels on the same memory and runs no Python. `make_fx` keeps the same of a function: its
operations on tensors, with every number of Python as it was.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from data.shards import LatentInfo
from generator import cuda_graphs
from generator.class_conditional.config import ClassSamplingConfig, DitConfig, WideHeadConfig
from generator.class_conditional.model import ClassGenerator, create_generator
from generator.class_conditional.sampling import sample_class_latents
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from generator.cuda_graphs import EAGER_CALLS, Graphed
from generator.model import Generator
from generator.sampling import Condition, sample_latents
from generator.sampling_config import SamplingConfig
from helpers.texts import Letters

SHAPE = (4, 3, 3)
LATENTS = LatentInfo("fp32", SHAPE, (0.5, -0.5, 0.0, 1.0), (2.0, 1.0, 0.5, 1.0), "autoencoder", "text")
CONFIG = GeneratorConfig(
    backbone=MotConfig(
        vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
    ),
    max_side=4,
    head=DdtHeadConfig(width=32, num_layers=1, num_heads=4),
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shaken(model: nn.Module) -> Any:
    """With weights that are nowhere zero, so that every input matters."""
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> Generator:
    return shaken(Generator.create(CONFIG, LATENTS, 0))


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every velocity is replayed from its third call on; the number of replays of each recording."""
    replays: list[int] = []

    def record(function: cuda_graphs.TensorFunction, inputs: Sequence[Tensor]) -> cuda_graphs.TensorFunction:
        program = make_fx(function)(*(x.clone() for x in inputs))
        number = len(replays)
        replays.append(0)

        def replay(*inputs: Tensor) -> Tensor:
            replays[number] += 1
            out: Tensor = program(*inputs)
            return out

        return replay

    monkeypatch.setattr(cuda_graphs, "can_record", lambda device, modules: not torch.is_grad_enabled())
    monkeypatch.setattr(cuda_graphs, "record", record)
    return replays


PROMPTS = [Condition((26, 1, 2, 27)), Condition((26, *range(9), 27))]
EDITS = [dataclasses.replace(one, sources=(random(*SHAPE, seed=i),)) for i, one in enumerate(PROMPTS)]


@pytest.mark.parametrize(
    ("conditions", "settings", "calls"),
    [
        (
            PROMPTS,
            {"guidance_interval": (0.3, 0.7)},
            [3, 5],
        ),  # of the times 8/8, ... 1/8 only 5/8, 4/8 and 3/8
        (EDITS, {}, [8]),
        pytest.param(EDITS, {"solver": "heun", "renorm": "channel"}, [15], marks=pytest.mark.slow),
    ],
    ids=["interval", "edits", "heun"],
)
def test_replays_draw_what_eager_calls_draw(
    conditions: list[Condition],
    settings: Any,
    calls: list[int],
    model: Generator,
    monkeypatch: Any,
    request: Any,
) -> None:
    config = SamplingConfig(num_steps=8, time_shift=1.0, text_guidance=3.0, source_guidance=1.5, **settings)
    eager = sample_latents(model, conditions, [1, 2], config, Letters())  # type: ignore[arg-type]
    replays = request.getfixturevalue("recordings")
    found = sample_latents(model, conditions, [1, 2], config, Letters())  # type: ignore[arg-type]
    assert torch.equal(found, eager)
    assert sorted(replays) == [count - EAGER_CALLS for count in calls]


@pytest.mark.parametrize(
    ("head", "guide"), [(None, "none"), (None, "no class"), (WideHeadConfig(32, 1, 2), "weaker model")]
)
def test_replays_draw_the_classes_that_eager_calls_draw(head: Any, guide: str, request: Any) -> None:
    config = DitConfig(num_classes=5, width=32, num_layers=1, num_heads=2, head=head)
    model: ClassGenerator = shaken(create_generator(config, LATENTS, 0))
    weak = shaken(create_generator(config, LATENTS, 1)) if guide == "weaker model" else None
    sampling = ClassSamplingConfig(
        num_steps=8, time_shift=1.0, guidance=1.0 if guide == "none" else 2.0, guidance_interval=(0.0, 0.5)
    )
    eager = sample_class_latents(model, [0, 3], [1, 2], sampling, weak)
    replays = request.getfixturevalue("recordings")
    assert torch.equal(sample_class_latents(model, [0, 3], [1, 2], sampling, weak), eager)
    assert replays == ([6] if guide == "none" else [2, 2])


def test_a_time_that_is_a_number_of_python_would_be_kept(recordings: list[int]) -> None:
    """What the tests above rest on: a recording does not look at Python again."""
    now = {"t": 1.0}
    with torch.no_grad():
        wrong = Graphed(lambda x: x * now["t"], [])
        found = []
        for t in (1.0, 0.75, 0.5, 0.25):
            now["t"] = t
            found.append(float(wrong(torch.ones(1))))
    assert found == [1.0, 0.75, 0.5, 0.5] and recordings == [2]


def test_a_failed_recording_is_told_once_and_every_call_still_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def refuse(*_: Any) -> Any:
        tried.append(1)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: True)
    monkeypatch.setattr(cuda_graphs, "record", refuse)
    monkeypatch.setattr(Graphed, "_has_failed", False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):  # two batches
            double = Graphed(lambda x: 2 * x, [])
            assert [float(double(torch.tensor(float(i)))) for i in range(6)] == [0, 2, 4, 6, 8, 10]
    assert len(tried) == 1
    assert [str(one.message) for one in told] == [
        "drawing goes on without CUDA graphs, more slowly: operation not permitted when stream is capturing"
    ]


def test_only_work_on_a_gpu_without_gradients_and_hooks_is_recorded() -> None:
    cuda, module = torch.device("cuda:0"), nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        assert cuda_graphs.can_record(cuda, [module])
        assert not cuda_graphs.can_record(torch.device("cpu"), [module])
        hook = module[0].register_forward_pre_hook(lambda *_: None)  # as ZeRO-3 has them
        assert not cuda_graphs.can_record(cuda, [module])
        hook.remove()
        assert cuda_graphs.can_record(cuda, [module])
    assert not cuda_graphs.can_record(cuda, [module])


def test_a_batch_leaves_no_recording_behind(
    model: Generator, recordings: list[int], monkeypatch: Any
) -> None:
    """Graphs hold their memory as long as something holds them."""
    import gc
    import weakref

    made: list[weakref.ref[Graphed]] = []
    initialise = Graphed.__init__

    def noted(self: Graphed, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        initialise(self, *arguments)

    monkeypatch.setattr(Graphed, "__init__", noted)
    gc.disable()
    try:
        sample_latents(model, PROMPTS, [1, 2], SamplingConfig(num_steps=4), Letters())  # type: ignore[arg-type]
        assert made and all(one() is None for one in made)
    finally:
        gc.enable()
