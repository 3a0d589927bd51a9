"""Memory and work of a tokenizer stage's phases: its own code runs on tensors that have a shape and no values.

Attention counts as what a fused kernel keeps (PyTorch's for the CPU and those for GPUs keep the same); the arithmetic
under autocast is the CPU's, which differs from a GPU's with precision bf16 alone: there norms keep fp32 as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from base.objective import LossOutput
from data.samples.images import PixelBatch, PixelConfig
from engine.deepspeed_engine import Precision, autocast
from engine.memory import TensorBytes
from tokenizer.training.stages import StageConfig, StageObjective, build_untrained

PHASES = ("losses", "+ discriminator's update", "+ its loss for the decoder")
"""From `in_phases`'s steps FIRST_STEP, FIRST_STEP + 1, ... on. Without a discriminator the first one alone."""
FIRST_STEP = 1  # step 0 is apart: optimizer states are made at its end
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PhaseSize:
    """Of one pack."""

    name: str
    activations: int
    """Bytes at the fullest."""
    flops: float
    """Of all products done, also those done again."""
    updates_adversary: bool = False


@dataclass(frozen=True)
class StageSize:
    """What a stage holds and does. Counts are of parameters."""

    trained: dict[str, int]
    """By module."""
    frozen: dict[str, int]
    num_adversary: int
    helper_bytes: int
    """Frozen networks beside the model: replica, perceptual network, discriminator's features."""
    latent_shape: tuple[int, int, int]
    phases: tuple[PhaseSize, ...]


def in_phases(stage: StageConfig) -> StageConfig:
    """The stage with one more of PHASES at each of its first steps."""
    return dataclasses.replace(
        stage,
        adaptive_pivot_start_step=0,
        gan_update_start_step=FIRST_STEP + 1,
        gan_loss_start_step=FIRST_STEP + 2,
    )


def phase_names(stage: StageConfig) -> tuple[str, ...]:
    """Those of PHASES that the stage has."""
    return PHASES if stage.gan is not None else PHASES[:1]


def stage_size(stage: StageConfig, pixels: PixelConfig, precision: Precision) -> StageSize:
    """Takes seconds, no memory and no weights. Raises UserError as `build_untrained` does."""
    with torch.device("meta"):
        objective = build_untrained(in_phases(stage))
    model, adversary, helpers = objective.model, objective.adversary, objective.helpers
    trained, frozen = count_parameters(model)
    held = [tensor for module in helpers for tensor in (*module.parameters(), *module.buffers())]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (model, *helpers, *([] if adversary is None else [adversary])):
            module.to_empty(device=CPU)
        if precision == "bf16":
            for module in (model, *([] if adversary is None else [adversary])):
                module.bfloat16()
        phases = tuple(
            _phase(objective, name, step, pixels, precision)
            for step, name in enumerate(phase_names(stage), FIRST_STEP)
        )
    return StageSize(
        trained=trained,
        frozen=frozen,
        num_adversary=0 if adversary is None else num_parameters(adversary),
        helper_bytes=sum(tensor.nbytes for tensor in held),
        latent_shape=model.latent_shape,
        phases=phases,
    )


def count_parameters(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """By child module: parameters that are trained, and that are not. Children without any are left out."""
    trained, frozen = (
        {
            name: sum(p.numel() for p in child.parameters() if p.requires_grad == is_trained)
            for name, child in model.named_children()
            if num_parameters(child)
        }
        for is_trained in (True, False)
    )
    return trained, frozen


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def _phase(
    objective: StageObjective, name: str, step: int, pixels: PixelConfig, precision: Precision
) -> PhaseSize:
    """One pack forward and backward, and the discriminator's, as the loop does it."""
    shape = (pixels.images_per_pack, 3, pixels.image_px, pixels.image_px)
    batch = PixelBatch(torch.zeros(shape, dtype=torch.uint8), ("",) * shape[0], 0, ({},) * shape[0])
    modules = (
        objective.model,
        *objective.helpers,
        *([] if objective.adversary is None else [objective.adversary]),
    )
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    gradients = [_zero_gradient(tensor) for tensor in weights if tensor.requires_grad]
    with TensorBytes([*weights, *gradients]) as counted:
        adversary_batch = _backward(objective.loss, batch, step, precision).adversary_batch
        if objective.adversary_active(step):
            _backward(objective.adversary_loss, adversary_batch, step, precision)
    return PhaseSize(name, counted.peak, counted.flops, objective.adversary_active(step))


def _backward(loss: Callable[..., LossOutput], batch: object, step: int, precision: Precision) -> LossOutput:
    with autocast(precision, CPU):
        output = loss(batch, step)
    output.loss_sum.backward()  # type: ignore[no-untyped-call]
    return output


def _zero_gradient(parameter: Tensor) -> Tensor:
    """There already, as the engine's arithmetic counts it: what the pass adds is its activations alone."""
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
