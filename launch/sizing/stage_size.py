"""Measures memory and work of a tokenizer stage's phases by running its code on fake tensors (shapes without values).

Attention counts as what a fused kernel keeps, which is equal for PyTorch's CPU kernel and the GPU kernels. Autocast is
the CPU's, which differs from a GPU's with precision bf16 only: there a GPU's norms keep fp32 values, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from base.objective import LossOutput
from data.config import PixelConfig
from data.samples.images import PixelBatch
from engine.deepspeed_engine import autocast
from engine.engine_config import Precision
from engine.memory import TensorBytes
from generator.memory_traffic import MOVED_PER_KEPT
from launch.runs.configs import TokenizerRun
from launch.sizing.estimate import PhaseSize, Plan, count_parameters, num_parameters
from launch.sizing.step_time import Work
from tokenizer.training.build_stage import StageObjective, build_untrained
from tokenizer.training.stage_config import StageConfig
from tokenizer.weights import shapes_only

PHASES = ("losses", "+ discriminator's update", "+ its loss for the decoder")
"""Phases that begin at steps FIRST_STEP, FIRST_STEP + 1, ... of `in_phases`. Without a discriminator only the first."""
FIRST_STEP = 1  # not step 0, at whose end the optimizer states are allocated
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StageSize:
    """Memory and work of a stage. Counts are in parameters."""

    trained: dict[str, int]
    """Trained parameters by module."""
    frozen: dict[str, int]
    num_adversary: int
    helper_bytes: int
    """Size of the frozen networks beside the model: replica, perceptual network, discriminator's features."""
    latent_shape: tuple[int, int, int]
    phases: tuple[PhaseSize, ...]


def tokenizer_plan(run: TokenizerRun) -> Plan:
    """Plan of a tokenizer stage, from `stage_size`.

    It assumes that the host keeps up with the GPU. Attention counts among the products. The bytes moved are in
    proportion to a pack's activations without checkpointing, and to how often its products are computed.
    """
    size = kept = stage_size(run.stage, run.pixels, run.engine.precision)
    if run.stage.activation_checkpointing:
        plain = dataclasses.replace(run.stage, activation_checkpointing=False)
        kept = stage_size(plain, run.pixels, run.engine.precision)
    steps, starts = run.engine.steps, [0]
    if len(size.phases) > 1:
        last = min(max(run.stage.gan_loss_start_step, 0), steps)
        starts += [min(run.stage.gan_update_start_step, last), last]
    images = run.pixels.images_per_pack * run.data.num_streams
    return Plan(
        trained=size.trained,
        frozen=size.frozen,
        num_adversary=size.num_adversary,
        helper_bytes=size.helper_bytes,
        phases=size.phases,
        phase_steps=tuple(end - start for start, end in zip(starts, [*starts[1:], steps], strict=True)),
        works=tuple(
            Work(
                phase.flops,
                0.0,
                whole.activations * MOVED_PER_KEPT[False] * phase.flops / whole.flops,
                launches=0,
            )
            for phase, whole in zip(size.phases, kept.phases, strict=True)
        ),
        num_tokens=images * size.latent_shape[1] * size.latent_shape[2],
        num_images=images,
        pack_units=run.pixels.images_per_pack,
        engine=run.engine,
        num_streams=run.data.num_streams,
    )


def in_phases(stage: StageConfig) -> StageConfig:
    """A copy of the stage that enters one of PHASES at each of its first steps."""
    return dataclasses.replace(
        stage,
        adaptive_pivot_start_step=0,
        gan_update_start_step=FIRST_STEP + 1,
        gan_loss_start_step=FIRST_STEP + 2,
    )


def phase_names(stage: StageConfig) -> tuple[str, ...]:
    """The PHASES that the stage has."""
    return PHASES if stage.gan is not None else PHASES[:1]


def stage_size(stage: StageConfig, pixels: PixelConfig, precision: Precision) -> StageSize:
    """Measures a stage in seconds, without memory or weights. Raises UserError: as `build_untrained`."""
    with shapes_only():
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


def _phase(
    objective: StageObjective, name: str, step: int, pixels: PixelConfig, precision: Precision
) -> PhaseSize:
    """Runs one pack forward and backward, then the discriminator's update, as the loop does."""
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
    """Allocates the gradient before the pass, so that only activations are counted; StateBytes counts gradients."""
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
