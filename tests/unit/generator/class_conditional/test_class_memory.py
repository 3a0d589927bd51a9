"""The arithmetic of a class-conditional step's memory, against what autograd saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.packs.class_batch import ClassBatch
from data.shards import LatentInfo
from engine.deepspeed_engine import autocast
from engine.engine_config import Precision
from engine.memory import TensorBytes
from generator.class_conditional.alignment import AlignedGenerator
from generator.class_conditional.config import AlignConfig, ClassFlowConfig, DitConfig, WideHeadConfig
from generator.class_conditional.model import new_generator
from generator.class_conditional.objective import ClassObjective
from generator.class_conditional.sizing import activation_bytes
from helpers.autograd_memory import FlashLike, saved_bytes

SHAPE, NUM_IMAGES = (4, 8, 8), 6
LATENTS = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "", "")
PLAIN = DitConfig(num_classes=5, width=128, num_layers=2, num_heads=4)
WIDE = WideHeadConfig(256, 2, 4)
ALIGN = AlignConfig(layer=1, width=256)


def bytes_on_gpu(config: DitConfig, *, precision: str, checkpointing: bool) -> int:
    """On fake tensors of a CUDA device, which dispatch and autocast as real ones do and need no GPU."""
    with torch.device("meta"):
        model = new_generator(config, LATENTS).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        model.to_empty(device="cuda:0")
        model.activation_checkpointing = checkpointing
        x, t = torch.zeros(NUM_IMAGES, *SHAPE), torch.zeros(NUM_IMAGES)
        labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
        return saved_bytes(model, lambda: model(x, t, labels), autocast=precision != "fp32")


def estimated_bytes(
    config: DitConfig, *, precision: str, checkpointing: bool, align: AlignConfig | None = None
) -> int:
    with torch.device("meta"):
        model: nn.Module = new_generator(config, LATENTS)
        if align is not None:
            model = AlignedGenerator(model, align, seed=0)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1 and p.requires_grad)
    return activation_bytes(
        config, SHAPE, NUM_IMAGES,
        precision=precision, checkpointing=checkpointing, num_weights=matrices, align=align,
    )  # fmt: skip


@pytest.mark.parametrize("head", [None, WIDE], ids=["lightning", "wide head"])
@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16", "fp32"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_memory_of_a_block_is_what_autograd_saves(
    head: WideHeadConfig | None, precision: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", FlashLike.apply)
    few = replace(PLAIN, head=head, qk_norm=qk_norm)
    if head is None:
        more = replace(few, num_layers=3)
    else:
        more = replace(few, head=replace(head, num_layers=3))

    def estimate(config: DitConfig, *, checkpointing: bool = False) -> int:
        return estimated_bytes(config, precision=precision, checkpointing=checkpointing)

    def saved(config: DitConfig, *, checkpointing: bool = False) -> int:
        return bytes_on_gpu(config, precision=precision, checkpointing=checkpointing)

    # Exact but for what each image (not token) keeps, the modulations of LightningDiT: 64 tokens share them.
    block, expected = estimate(more) - estimate(few), saved(more) - saved(few)
    assert block == pytest.approx(expected, rel=0.01)
    # The two ends: a coarse count of a small part, which is a fifth of so small a model.
    assert estimate(few) == pytest.approx(saved(few), rel=0.05)
    # Checkpointed, a block keeps its input; what a step holds while a block is made again is no saved tensor.
    kept = [saved(config, checkpointing=True) for config in (more, few)]
    assert estimate(more, checkpointing=True) - estimate(few, checkpointing=True) == kept[0] - kept[1]


def step_bytes(
    config: DitConfig, *, precision: Precision, checkpointing: bool, align: AlignConfig | None
) -> int:
    """At the fullest of a whole step with its loss, gradients apart; on fake tensors of the CPU."""
    with torch.device("meta"):
        flow = ClassFlowConfig(activation_checkpointing=checkpointing, align=align)
        objective = ClassObjective(new_generator(config, LATENTS), flow, start="")
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.model.to_empty(device="cpu")
        weights = list(objective.model.parameters())
        for parameter in weights:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
        with TensorBytes([*weights, *gradients]) as counted:
            labels = torch.zeros(NUM_IMAGES, dtype=torch.int64)
            batch = ClassBatch(torch.zeros(NUM_IMAGES, *SHAPE), labels, ("",) * NUM_IMAGES, seed=0)
            with autocast(precision, torch.device("cpu")):
                output = objective.loss(batch, 0)
            output.loss_sum.backward()
        return counted.peak


@pytest.mark.parametrize(
    ("head", "precision", "checkpointing", "align"),
    [
        (None, "fp32", False, None),
        (None, "fp32", True, ALIGN),
        (None, "bf16_autocast", False, ALIGN),
        (None, "bf16_autocast", True, None),
        (WIDE, "fp32", False, ALIGN),
        (WIDE, "fp32", True, None),
        (WIDE, "bf16_autocast", False, None),
        (WIDE, "bf16_autocast", True, ALIGN),
    ],
)
def test_a_whole_step_is_as_full_as_estimated(
    head: WideHeadConfig | None, precision: Precision, checkpointing: bool, align: AlignConfig | None
) -> None:
    config = replace(PLAIN, head=head)
    expected = estimated_bytes(config, precision=precision, checkpointing=checkpointing, align=align)
    expected += cpu_norm_bytes(config, NUM_IMAGES * 64, precision, checkpointing=checkpointing)
    found = step_bytes(config, precision=precision, checkpointing=checkpointing, align=align)
    # What each image has once, temporary results of single operations: in so small a model more than in a large one.
    assert expected == pytest.approx(found, rel=0.06)


def cpu_norm_bytes(config: DitConfig, num_tokens: int, precision: Precision, *, checkpointing: bool) -> int:
    """A CPU's RMSNorm is made of single operations: it keeps what it has normed once more, in fp32; and of what
    comes in bf16, which under autocast are queries, keys and a head's stream, an fp32 copy.
    """
    layers = [config.width] * config.num_layers
    layers += [] if config.head is None else [config.head.width] * config.head.num_layers
    norms = 4 if config.qk_norm else 2
    widths = max(layers) * norms if checkpointing else sum(layers) * norms + layers[-1]
    if precision == "bf16_autocast":
        halves = [config.width * 2] * config.num_layers
        halves += [] if config.head is None else [config.head.width * 4] * config.head.num_layers
        is_half = config.head is not None
        widths += max(halves) if checkpointing else sum(halves) + layers[-1] * is_half
    return 4 * num_tokens * widths
