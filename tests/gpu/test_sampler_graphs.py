"""Drawing with CUDA graphs against drawing without, and work that never waits for the GPU, on a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.packs.transfer import pinned
from data.shards import LatentInfo
from generator import cuda_graphs
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig, DitConfig
from generator.class_conditional.model import create_generator
from generator.class_conditional.objective import build_class_objective
from generator.class_conditional.sampling import sample_class_latents
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig, MotConfig
from generator.cuda_graphs import Graphed
from generator.model import Generator
from generator.objective import build_objective
from generator.sampling import Condition, GuidedVelocity, sample_latents
from generator.sampling_config import SamplingConfig
from generator.solvers import integrate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = (16, 8, 8)
LATENTS = LatentInfo("bf16", SHAPE, (0.0,) * 16, (1.0,) * 16, "autoencoder", "text")
CONFIG = GeneratorConfig(
    backbone=MotConfig(
        vocab_size=64, width=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512
    ),
    max_side=8,
    head=DdtHeadConfig(width=256, num_layers=1, num_heads=4),
    text_output=True,
)
CLASSES = DitConfig(num_classes=5, width=256, num_layers=4, num_heads=4)
CUDA = torch.device("cuda", 0)


class Special:
    vocab_size, vision_start_id, vision_end_id = 64, 28, 29
    fingerprint = "text"


@torch.no_grad()
def shaken(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.to(CUDA)


def image(*, noisy: bool) -> ImageSplit:
    return ImageSplit(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)), noisy)


CONDITIONS = [Condition((26, *range(length), 27), (image(noisy=False).latents,)) for length in (2, 9, 30)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each graph."""
    made: list[int] = []
    record = cuda_graphs.record

    def noted(*arguments: Any) -> Any:
        made.append(1)
        return record(*arguments)

    monkeypatch.setattr(cuda_graphs, "record", noted)
    monkeypatch.setattr(Graphed, "_has_failed", False)
    return made


def assert_alike(found: Tensor, expected: Tensor, bf16: bool) -> None:
    """The same kernels on the same numbers; cuBLAS may choose others in another stream, which rounds otherwise."""
    worst = (found - expected).abs().max() / expected.std()
    assert float(worst) < (5e-2 if bf16 else 1e-3)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("settings", [{}, {"guidance_interval": (0.3, 0.7)}, {"solver": "heun"}])
def test_graphs_draw_what_eager_calls_draw(
    bf16: bool, settings: Any, recorded: Any, monkeypatch: Any
) -> None:
    model = shaken(Generator.create(CONFIG, LATENTS, 0))
    config = SamplingConfig(num_steps=16, **settings)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        found = [sample_latents(model, CONDITIONS, [1, 2, 3], config, Special()) for _ in range(2)]  # type: ignore[arg-type]
        num_graphs = len(recorded)
        monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: False)
        eager = sample_latents(model, CONDITIONS, [1, 2, 3], config, Special())  # type: ignore[arg-type]
    assert num_graphs == (4 if "guidance_interval" in settings else 2) and len(recorded) == num_graphs
    assert not Graphed._has_failed
    for one in found:
        assert_alike(one, eager, bf16)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_graphs_draw_the_classes_that_eager_calls_draw(bf16: bool, recorded: Any, monkeypatch: Any) -> None:
    model, weak = (shaken(create_generator(CLASSES, LATENTS, seed)) for seed in (0, 1))
    config = ClassSamplingConfig(num_steps=16, guidance=2.0, guidance_interval=(0.0, 0.6))
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        found = sample_class_latents(model, [0, 3, 4], [1, 2, 3], config, weak)
        assert len(recorded) == 2 and not Graphed._has_failed
        monkeypatch.setattr(cuda_graphs, "can_record", lambda *_: False)
        eager = sample_class_latents(model, [0, 3, 4], [1, 2, 3], config, weak)
    assert_alike(found, eager, bf16)


def test_the_memory_of_graphs_is_given_back() -> None:
    model = shaken(Generator.create(CONFIG, LATENTS, 0))

    def reserved() -> int:
        with torch.autocast("cuda", torch.bfloat16):
            sample_latents(model, CONDITIONS, [1, 2, 3], SamplingConfig(num_steps=8), Special())  # type: ignore[arg-type]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = reserved()  # with what cuBLAS keeps for the stream of recordings
    assert [reserved() for _ in range(3)] == [first] * 3


def test_a_graph_that_cannot_be_falls_back(recorded: Any) -> None:
    """Reading a number inside is forbidden while a graph is recorded; the GPU works on afterwards."""
    waits = Graphed(lambda x: x * float(x.sum().item()), [])
    with torch.no_grad(), pytest.warns(UserWarning, match="without CUDA graphs"):
        found = [float(waits(torch.full((), float(i), device=CUDA))) for i in range(5)]
    assert found == [0.0, 1.0, 4.0, 9.0, 16.0] and len(recorded) == 1


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed() -> PackedBatch:
    samples = [[image(noisy=False), TextSplit([26, 1, 27], loss=True), image(noisy=True)] for _ in range(3)]
    return build_packed_batch(
        samples, vision_start_id=28, vision_end_id=29, max_side=8, seed=7, sample_ids=list("abc")
    )


def test_no_loss_waits_for_the_gpu() -> None:
    """From the batch on the host to the end of the backward pass."""
    flow = FlowConfig(text_loss_weight=1.0)
    packs = build_objective("edit", CONFIG, flow, LATENTS, Special(), seed=0)  # type: ignore[arg-type]
    classes = build_class_objective(CLASSES, ClassFlowConfig(), LATENTS, seed=0)
    for objective, batch in (
        (packs, packed()),
        (classes, ClassBatch(torch.randn(6, *SHAPE), torch.arange(6) % 5, tuple("abcdef"), 7)),
    ):
        objective.to(CUDA)
        for is_first in (True, False):  # the first loads kernels
            ready: Any = pinned(batch)
            with contextlib.nullcontext() if is_first else waiting_is_an_error():
                output = objective.loss(ready.to(CUDA), 0)  # type: ignore[arg-type]
                output.loss_sum.backward()


def test_no_step_of_a_solver_waits_for_the_gpu() -> None:
    model = shaken(Generator.create(CONFIG, LATENTS, 0))
    times = [step / 8 for step in range(8, -1, -1)]
    config = SamplingConfig(guidance_interval=(0.3, 0.7))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        velocity = GuidedVelocity(model, CONDITIONS, times[:-1], config, Special())  # type: ignore[arg-type]
        x_SPC = torch.randn(3, 64, 16, device=CUDA)
        integrate(velocity, x_SPC, times, "euler")  # records
        with waiting_is_an_error():
            integrate(velocity, x_SPC, times, "euler")


def test_a_pinned_batch_arrives_whole_and_its_noise_is_the_seed_s() -> None:
    batch = packed()
    moved = pinned(batch).to(CUDA)
    for name in ("text_ids", "latents", "rope_positions", "image_noisy"):
        assert torch.equal(getattr(moved, name).cpu(), getattr(batch, name))
    assert torch.equal(moved.attention.full.kv_index.cpu(), batch.attention.full.kv_index)
    assert pinned(batch).latents.is_pinned()
    first, again = (torch.randn(9, generator=torch.Generator(CUDA).manual_seed(7), device=CUDA) for _ in "12")
    assert torch.equal(first, again)
