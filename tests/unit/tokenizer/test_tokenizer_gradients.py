"""Gradients of every tokenizer stage against plain autograd, and of compiled blocks against plain ones."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import stages
from helpers.stage_formulas import plain_loss
from helpers.stages import built, pixel_batch
from tokenizer.blocks import compile_blocks, repeated
from tokenizer.training import adaptive
from tokenizer.training.objective_base import StageObjective

PIVOT = dataclasses.replace(stages.PIVOT, gan_loss_start_step=1)
BEFORE, WITH = 0, 1  # steps: the adversarial loss is not yet in force, and is
COUNT = 3
STAGES = ("pivot", "joint", "frozen encoder", "bridge", "decoder")


def build(stage: str, **changes: Any) -> StageObjective:
    if stage == "frozen encoder":
        return built("pivot", PIVOT, train_encoder=False, **changes)
    return built(stage, PIVOT, **changes)


def gradients(
    objective: StageObjective, precision: str, mean_loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Of the trained parameters, as AdamW would see them."""
    objective.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        loss = mean_loss()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: parameter.grad.float()
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is not None
    }


def check(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol_of_largest: float) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol_of_largest * largest, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("step", [BEFORE, WITH], ids=["before the adversarial loss", "with it"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_every_stage_are_those_of_plain_autograd(stage: str, step: int, precision: str) -> None:
    objective = build(stage)
    if precision == "bf16":  # as DeepSpeed does
        objective.model.bfloat16()
    ours = gradients(objective, precision, lambda: objective.loss(pixel_batch(COUNT), step).loss_sum / COUNT)
    plain = gradients(objective, precision, lambda: plain_loss(objective, step))
    if (
        precision == "fp32"
    ):  # the same sums in another order; entries far below the largest carry its rounding
        check(ours, plain, rtol=1e-4, atol_of_largest=1e-6)
        return
    # bf16 rounds a gradient at x_hat, at f and at each layer to 8 bits; ours is rounded after other sums than plain.
    flat = [torch.cat([gradient.flatten() for gradient in side.values()]) for side in (ours, plain)]
    assert ours.keys() == plain.keys()
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.02


@pytest.mark.parametrize(("step", "passes"), [(BEFORE, 1), (WITH, 2)])
def test_the_decoder_is_passed_backward_once_before_the_adversarial_loss(step: int, passes: int) -> None:
    objective = build("pivot")
    layer = repeated(objective.model.decoder)[0]
    count = []
    layer.register_full_backward_hook(lambda *_: count.append(1))  # type: ignore[arg-type]
    objective.loss(pixel_batch(COUNT), step).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert len(count) == passes


def test_gradients_handed_on_are_scaled_by_what_comes_back_and_only_once() -> None:
    x, weight = torch.ones(3, requires_grad=True), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    read = 2 * x
    gradient, handed_on = adaptive.back_once(read * weight, torch.ones(3), read, [weight])
    assert gradient.tolist() == [1.0, 2.0, 3.0] and float(handed_on.detach()) == 0.0
    (0.5 * handed_on).backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.tolist() == [1.0, 1.0, 1.0]
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(AssertionError, match="used the gradients up"):
        handed_on.backward()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced and cut as for a GPU, without generating code for the CPU, which takes a minute."""
    compile_eagerly = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["joint", "decoder"])
@pytest.mark.usefixtures("traced")
def test_compiled_blocks_change_no_gradient_and_no_name(stage: str, checkpointing: bool) -> None:
    found = []
    for is_compiled in (False, True):
        objective = build(stage, compile=is_compiled, activation_checkpointing=checkpointing)
        found.append([steps_gradients(objective, step) for step in (BEFORE, WITH)])
        names = list(objective.model.state_dict())
        assert names == list(build(stage).model.state_dict())
        compiled = [block._compiled_call_impl is not None for block in repeated(objective.model.decoder)]
        assert compiled == [is_compiled] * len(compiled)
    for plain, compiled_gradients in zip(*found, strict=True):
        check(compiled_gradients, plain, rtol=1e-4, atol_of_largest=1e-6)  # as above


@pytest.mark.usefixtures("traced")
def test_a_copy_of_a_compiled_network_runs_with_its_own_weights() -> None:
    objective = build("pivot", compile=True)
    decoder = objective.model.decoder
    f = torch.randn(1, 48, 4, 4, generator=torch.Generator().manual_seed(1))
    before = decoder(f)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(f), twin.pixel_mean.expand_as(before))
    torch.testing.assert_close(decoder(f), before, rtol=0, atol=0)
    compile_blocks(twin)
    assert torch.equal(twin(f), twin.pixel_mean.expand_as(before))


def steps_gradients(objective: StageObjective, step: int) -> dict[str, Tensor]:
    return gradients(objective, "fp32", lambda: objective.loss(pixel_batch(COUNT), step).loss_sum)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_generated_code_changes_no_gradient() -> None:
    objectives = [build("joint", compile=is_compiled) for is_compiled in (False, True)]
    plain, compiled = (steps_gradients(objective, WITH) for objective in objectives)
    check(compiled, plain, rtol=1e-3, atol_of_largest=1e-5)  # fused kernels sum in yet another order


def test_stage_two_and_three_are_built_without_an_export() -> None:
    assert build("bridge").model.latent_shape == build("decoder").model.latent_shape == (6, 4, 4)
