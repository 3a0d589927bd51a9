"""No loss of a generator, nor the judge's, makes the CPU wait for the GPU; and the counter sees every kind of wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.packs.transfer import to_device
from data.samples.images import PixelBatch
from data.shards import LatentInfo
from generator.class_conditional.config import (
    AlignConfig,
    ClassFlowConfig,
    ClassSamplingConfig,
    DitConfig,
    WideHeadConfig,
)
from generator.class_conditional.model import create_generator
from generator.class_conditional.objective import build_class_objective
from generator.class_conditional.sampling import GuidedClassVelocity
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig
from generator.objective import build_objective
from generator.solvers import integrate
from helpers.generators import BACKBONE
from helpers.texts import Letters
from quickstart.config import JudgeConfig
from quickstart.judge import JudgeObjective
from quickstart.judge_network import SceneClasses

SHAPE = (4, 2, 3)
LATENTS = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")
PLAIN = GeneratorConfig(backbone=BACKBONE, max_side=4)
FULL = dataclasses.replace(PLAIN, text_output=True, head=DdtHeadConfig(width=48, num_layers=1, num_heads=4))
CUDA = torch.device("cuda:0")


def pack(*, editing: bool) -> PackedBatch:
    samples = []
    for length in (3, 9):
        sources = [ImageSplit(torch.randn(SHAPE), noisy=False)] if editing else []
        text = TextSplit(list(range(length)), loss=editing)
        samples.append([*sources, text, ImageSplit(torch.randn(SHAPE), noisy=True)])
    return build_packed_batch(
        samples, vision_start_id=28, vision_end_id=29, max_side=4, seed=7, sample_ids=["a", "b"]
    )


def stand_in(*arguments: Any, causal: bool, **_: Any) -> Tensor:
    """A variable-length kernel's shapes: queries in, queries out."""
    q, k, v = (x for x in arguments if isinstance(x, Tensor))
    return q + k.sum() + v.sum()


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_no_host_device_wait_in_the_loss_of_a_packed_batch(
    task: Any, kernel: str, device_waits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edits with a text loss and a DDT head. Forward only: autograd's engine asks for a real GPU."""
    monkeypatch.setattr("generator.attention.choose_backend", lambda *_: kernel)
    monkeypatch.setattr("generator.model.choose_backend", lambda *_: kernel)
    monkeypatch.setattr("generator.attention.varlen_attention", stand_in)
    editing, batch = task == "edit", pack(editing=task == "edit")
    if kernel == "sdpa":
        batch.build_buckets()  # as the packer does where SDPA will run
    flow = FlowConfig(text_loss_weight=float(editing))
    objective = build_objective(task, FULL if editing else PLAIN, flow, LATENTS, Letters(), seed=0)  # type: ignore[arg-type]
    with device_waits() as waits:
        waits.to_gpu(objective.model)
        output = objective.loss(batch.to(CUDA), 0)
        assert output.loss_sum.is_cuda and bool(output.further) == editing
    assert waits == [] and waits.num_copies == 1  # the batch; noise is drawn where it is needed


@pytest.mark.parametrize("head", [None, WideHeadConfig(48, 1, 4)], ids=["lightning", "wide head"])
@pytest.mark.parametrize("align", [None, AlignConfig(layer=1, width=16)], ids=["plain", "aligned"])
def test_no_host_device_wait_in_the_loss_of_classes(head: Any, align: Any, device_waits: Any) -> None:
    config = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4, head=head)
    batch = ClassBatch(torch.randn(6, *SHAPE), torch.arange(6), tuple("abcdef"), 7)
    objective = build_class_objective(config, ClassFlowConfig(align=align), LATENTS, seed=0)
    with device_waits() as waits:
        waits.to_gpu(objective.model)
        output = objective.loss(batch.to(CUDA), 0)
        assert output.loss_sum.is_cuda
    assert waits == [] and waits.num_copies == 1


def test_no_host_device_wait_in_the_loss_of_the_judge(device_waits: Any) -> None:
    scene = {"objects": [{"name": "square", "box": [3, 3, 20, 20]}], "background": "dark"}
    batch = PixelBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ("a", "b"), 7, ({"scene": scene},) * 2)
    objective = JudgeObjective(JudgeConfig(channels=(16, 16, 32)), SceneClasses(("square",), ("dark",)))
    with device_waits() as waits:
        waits.to_gpu(objective.model)
        output = objective.loss(batch.to(CUDA), 0)
        assert output.loss_sum.is_cuda
    assert waits == []


def test_no_host_device_wait_between_the_steps_of_a_solver(device_waits: Any) -> None:
    config = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4)
    sampling = ClassSamplingConfig(guidance=2.0, guidance_interval=(0.3, 1.0))
    model = create_generator(config, LATENTS, 0)
    with device_waits() as waits:
        waits.to_gpu(model)
        labels, x = torch.arange(2, device=CUDA), torch.zeros(2, *SHAPE, device=CUDA)
        velocity = GuidedClassVelocity(model, labels, sampling)
        integrate(velocity, x, [1.0, 0.7, 0.4, 0.2, 0.0], "heun")
    assert waits == []


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number read": lambda x: x.sum().item(),
    "a float": lambda x: float(x.sum()),
    "an if": lambda x: 1 if x.sum() > 0 else 0,
    "to the CPU": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
    "numbers to the GPU": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
    "a copy from memory that is not pinned": lambda x: torch.zeros(3).to(CUDA, non_blocking=True),
    "a copy that is waited for": lambda x: to_device(torch.zeros(3), torch.device("cpu")).to(CUDA),
    "a copy into a tensor": lambda x: x.copy_(torch.zeros(4)),
    "a mask": lambda x: x[x > 0],
    "a mask to write": lambda x: x.__setitem__(x > 0, x[:2]),
    "an index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "nonzero": lambda x: x.nonzero(),
    "repeats without a size": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=CUDA)),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_counter_sees(name: str, device_waits: Any) -> None:
    with device_waits() as waits:
        x = torch.zeros(4, device=CUDA)
        assert waits == []
        try:
            WAITS[name](x)
        except Exception as error:  # fake tensors know no sizes that depend on data
            assert "DynamicOutputShape" in type(error).__name__ or "DataDependent" in type(error).__name__
    assert len(waits) >= 1


def test_the_counter_lets_work_of_the_gpu_pass(device_waits: Any) -> None:
    with device_waits() as waits:
        x = to_device(torch.zeros(4), CUDA)
        y = torch.full((), 0.5, device=CUDA) * x[torch.arange(2, device=CUDA)] + torch.tensor(2.0)
        y = torch.where(y > 0, y, 0.0).masked_fill(y > 1, 3.0)
        torch.randn(3, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA)
    assert waits == [] and y.is_cuda
