"""Every tokenizer stage with every loss on a GPU: bf16 autocast against fp32, kept dtypes, compiled against plain.

VGG16 and the discriminator's DINOv2-S have their real sizes and random weights: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.samples.images import PixelBatch
from engine.deepspeed_engine import autocast
from engine.engine_config import Precision
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.frozen import products
from tokenizer.training.build_stage import build_untrained
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig, StageConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda", 0)
SIDE_PX = 128
VIT = RepresentationConfig(
    name="vit_tiny_patch16_224",
    input_px=SIDE_PX,
    weights="random",
    overrides={"img_size": SIDE_PX, "embed_dim": 192, "depth": 4, "num_heads": 3},
)
PLAIN = AutoencoderConfig(
    representation=VIT,
    decoder=PixelDecoderConfig(width=256, layers=4, heads=4, mlp_width=1024, patch_px=16),
    image_px=SIDE_PX,
)
BRIDGE = BridgeConfig(latent_channels=16, decoder_layers=2, num_heads=3)
PIVOT = StageConfig(
    stage="pivot",
    autoencoder=PLAIN,
    perceptual=PerceptualConfig(vgg16_weights="random"),
    discriminator=DiscriminatorConfig(RepresentationConfig("dinov2-s")),
    adaptive_pivot_start_step=0,
    gan_loss_start_step=1,
)
STAGES = ("pivot", "joint", "frozen encoder", "bridge", "decoder")
STEPS = (0, 1)  # before the adversarial loss is in force, and with it
COUNT = 4


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """The reference is fp32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def build(stage: str, **changes: Any) -> StageObjective:
    """On the GPU, as after some training: E has left its replica, VGG16's activations are of ordinary size."""
    config, shapes = dataclasses.replace(PIVOT, **changes), None
    whole = dataclasses.replace(PLAIN, bridge=BRIDGE)
    if stage == "joint":
        config = dataclasses.replace(config, stage="joint", autoencoder=whole)
    elif stage == "frozen encoder":
        config = dataclasses.replace(config, train_encoder=False)
    elif stage in ("bridge", "decoder"):
        shapes, bridge = (PLAIN, BRIDGE) if stage == "bridge" else (whole, None)
        config = dataclasses.replace(config, stage=stage, autoencoder=None, init_from="none", bridge=bridge)
    objective = build_untrained(config, starts_from=shapes)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=noise)
        if isinstance(objective.image_loss.perceptual, LpipsVgg16):
            for layer in objective.image_loss.perceptual.vgg:
                if isinstance(layer, nn.Conv2d):
                    std = math.sqrt(2 / layer.weight[0].numel())
                    layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=noise))
    objective.to(GPU)
    return objective


def batch() -> PixelBatch:
    """Smooth images, as photographs are."""
    seeded = torch.Generator().manual_seed(5)
    coarse = torch.rand(COUNT, 3, 8, 8, generator=seeded)
    pixels = (F.interpolate(coarse, SIDE_PX, mode="bicubic").clamp(0, 1) * 255).byte()
    return PixelBatch(pixels, tuple(map(str, range(COUNT))), 5, ({},) * COUNT).to(GPU)


def take(objective: StageObjective, step: int, precision: Precision) -> tuple[dict[str, float], list[Tensor]]:
    """Losses of one pack, and the flat gradients of the model and, where it learns, of the discriminator."""
    objective.model.zero_grad()
    with autocast(precision, GPU):
        out = objective.loss(batch(), step)
    out.loss_sum.backward()  # type: ignore[no-untyped-call]
    numbers = {name: float(value) / COUNT for name, value in out.metrics.items()}
    numbers["loss"] = float(out.loss_sum) / COUNT
    found = [flat(objective.model)]
    if objective.adversary is not None:
        objective.adversary.zero_grad()
        with autocast(precision, GPU):
            adversary = objective.adversary_loss(out.adversary_batch, step)
        adversary.loss_sum.backward()  # type: ignore[no-untyped-call]
        numbers["adversary"] = float(adversary.loss_sum) / COUNT
        found.append(flat(objective.adversary))
    return numbers, found


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_gradients_in_bf16_are_those_in_fp32_to_rounding(stage: str, step: int) -> None:
    exact, gradients = take(build(stage), step, "fp32")
    rounded, rounded_gradients = take(build(stage), step, "bf16_autocast")
    assert exact.keys() == rounded.keys()
    for name in ("loss", "rec", "perceptual", "feature", "kl"):
        if name in exact:  # means over many elements, each rounded to 8 bits in every layer
            assert rounded[name] == pytest.approx(exact[name], rel=0.02), name
    for a, b in zip(gradients, rounded_gradients, strict=True):
        assert bool(b.isfinite().all())
        # Noise of 0.4 % a layer, and ReLUs of VGG16 whose input changes its sign.
        assert float(F.cosine_similarity(a, b, dim=0)) > 0.98


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_networks_hold_bf16_and_the_model_fp32(stage: str) -> None:
    objective = build(stage)
    before = dict(objective.fingerprints())
    take(objective, 1, "bf16_autocast")
    for helper in objective.helpers:
        assert {layer.weight.dtype for layer in products(helper)} == {torch.bfloat16}
    assert {parameter.dtype for parameter in objective.model.parameters()} == {torch.float32}
    assert objective.fingerprints() == before


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("stage", STAGES)
def test_no_loss_waits_for_the_gpu(stage: str, step: int) -> None:
    objective, pixels = build(stage), batch()
    take(objective, step, "bf16_autocast")  # buffers of libraries, twins
    torch.cuda.set_sync_debug_mode("error")
    try:
        with autocast("bf16_autocast", GPU):
            out = objective.loss(pixels, step)
        out.loss_sum.backward()  # type: ignore[no-untyped-call]
        if objective.adversary is not None:
            with autocast("bf16_autocast", GPU):
                adversary = objective.adversary_loss(out.adversary_batch, step)
            adversary.loss_sum.backward()  # type: ignore[no-untyped-call]
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", ["joint", "decoder"])
def test_compiled_blocks_change_nothing_but_rounding(stage: str) -> None:
    for step in STEPS:
        (plain, gradients), (compiled, compiled_gradients) = (
            take(build(stage, compile=is_compiled), step, "bf16_autocast") for is_compiled in (False, True)
        )
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=0.01)  # fused kernels round less often
        for a, b in zip(gradients, compiled_gradients, strict=True):
            assert float(F.cosine_similarity(a, b, dim=0)) > 0.98
