"""The arithmetic of a step's work, against what PyTorch counts."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.shards import LatentInfo
from engine.memory import TensorBytes
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from generator.gather import gather_rows
from generator.model import Generator
from generator.qwen import QWEN2_5_0_5B
from generator.sizing import PackSize, activation_bytes, forward_flops, training_flops, typical_pack
from helpers.autograd_memory import FlashLike, saved_bytes

CONFIG = GeneratorConfig(
    backbone=MotConfig(
        vocab_size=32, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48
    ),
    max_side=4,
)
CHANNELS = 4
LATENTS = LatentInfo("fp32", (CHANNELS, 3, 3), (0.0,) * CHANNELS, (1.0,) * CHANNELS, "autoencoder", "text")
HEAD = DdtHeadConfig(width=48, num_layers=2, num_heads=4)


def pack() -> PackedBatch:
    clean, noisy = (ImageSplit(torch.ones(LATENTS.shape), noisy) for noisy in (False, True))
    samples: list[list[TextSplit | ImageSplit]] = [
        [TextSplit([1, 5, 6, 7, 2], loss=True), noisy, noisy],
        [clean, TextSplit([1, 9, 2]), noisy],
    ]
    return build_packed_batch(
        samples, vision_start_id=3, vision_end_id=4, max_side=4, seed=7, sample_ids=["a", "b"]
    )


def attend_nothing(_layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    return q  # the counter counts padded pairs; the area is counted below


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, text_output=True)],
    ids=["velocities", "text"],
)
def test_products_of_a_forward_pass_are_those_that_pytorch_counts(config) -> None:
    batch, model = pack(), Generator.create(config, LATENTS, 0)
    times = torch.zeros(len(batch.image_noisy))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden, velocities = model._hidden(
            batch, batch.latents, times, attend_nothing, text_output=config.text_output
        )
        model._velocity(batch, batch.latents, times, velocities)
        if hidden is not None:
            model.text_loss(hidden[batch.text_loss_rows], batch.text_loss_ids, model.backbone.embed_tokens)
    size = dataclasses.replace(PackSize.of(batch), attended_area=0, output_area=0)
    assert forward_flops(size, config, CHANNELS) == counter.get_total_flops()


def test_a_head_adds_what_pytorch_counts(monkeypatch) -> None:
    config = dataclasses.replace(CONFIG, head=HEAD)
    batch, model = pack(), Generator.create(config, LATENTS, 0)
    monkeypatch.setattr("generator.model.attend", lambda q, k, v, plan, kernel: q)
    times = torch.zeros(len(batch.image_noisy))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch, batch.latents, times, attention=attend_nothing)
    size = dataclasses.replace(PackSize.of(batch), attended_area=0, output_area=0, noisy_area=0)
    assert forward_flops(size, config, CHANNELS) == counter.get_total_flops()


def test_attention_is_counted_over_the_pairs_of_the_mask() -> None:
    size = PackSize.of(pack())
    # [5 text, 11, 11]: 15 causal pairs, each image sees 5 + 11; [11, 3 text, 11]: 121, text 3 * 11 + 6, target 11 * 25
    assert size.attended_area == 15 + 2 * 11 * 16 + 121 + 39 + 11 * 25
    assert size.output_area == 2 * 9 * 16 + 9 * 25  # latents alone ask
    assert size.noisy_area == 3 * 81
    more = dataclasses.replace(size, attended_area=size.attended_area + 1)
    per_pair = 2 * 2 * 4 * 8  # q k and p v, in every head
    assert forward_flops(more, CONFIG, CHANNELS) - forward_flops(size, CONFIG, CHANNELS) == 2 * per_pair
    assert training_flops(size, CONFIG, CHANNELS) == 3 * forward_flops(size, CONFIG, CHANNELS)


def test_the_papers_model_is_counted_as_its_parameters_say() -> None:
    """Without attention, a token costs 2 FLOPs for each weight of its expert: 357.8 M in Qwen2.5-0.5B's 24 layers."""
    config = GeneratorConfig(backbone=QWEN2_5_0_5B, max_side=64, text_output=True)
    size = PackSize(1000, *[0] * 10)
    layer = 896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864
    assert forward_flops(size, config, 64) == 2 * 1000 * 24 * layer
    assert 24 * layer == 357_826_560


def test_a_typical_pack_is_made_of_typical_samples() -> None:
    size = typical_pack(3 * (2 * (2 + 9) + 5), 5, (3, 3), num_sources=1)
    assert (size.num_understanding, size.num_generation, size.num_noisy, size.num_images) == (27, 54, 27, 6)
    assert size.noisy_area == 3 * 81


WIDE = GeneratorConfig(
    backbone=MotConfig(
        vocab_size=32, width=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=512
    ),
    max_side=4,
)
BIG_HEAD = DdtHeadConfig(width=256, num_layers=2, num_heads=4)


def flash_like(q: Tensor, k: Tensor, v: Tensor, plan: Any, _kernel: object = None) -> Tensor:
    groups = ((q[: plan.num_causal], plan.causal), (q[plan.num_causal :], plan.full))
    outputs = [
        FlashLike.apply(queries, gather_rows(k, group), gather_rows(v, group))
        for queries, group in groups
        if len(queries)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def long_pack() -> PackedBatch:
    clean, noisy = (ImageSplit(torch.ones(LATENTS.shape), noisy) for noisy in (False, True))
    samples: list[list[TextSplit | ImageSplit]] = [
        [TextSplit([1] * 12), noisy],
        [clean, TextSplit([1] * 5), noisy],
    ]
    return build_packed_batch(
        samples * 20, vision_start_id=3, vision_end_id=4, max_side=4, seed=7, sample_ids=["a", "b"] * 20
    )


def forward(model: Generator, batch: PackedBatch) -> Tensor:
    plan = batch.attention
    times = torch.zeros(len(batch.image_noisy), device=batch.latents.device)
    return model(
        batch, batch.latents, times, lambda _layer, q, k, v: flash_like(q, k, v, plan.of(len(q)))
    ).square()


@pytest.fixture
def flash_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.model.attend", flash_like)


@pytest.mark.usefixtures("flash_in_the_head")
@pytest.mark.parametrize("head", [None, BIG_HEAD], ids=["linear", "ddt"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_what_autograd_saves_on_a_gpu(head, precision, monkeypatch) -> None:
    """On fake tensors of a CUDA device, which dispatch and autocast as real ones do and need no GPU."""
    config = dataclasses.replace(WIDE, head=head)
    monkeypatch.setattr("generator.model.choose_backend", lambda *_: "varlen")
    batch, is_half = long_pack(), precision == "bf16"
    size = PackSize.of(batch)
    saved: dict[str, int] = {}
    for name, num_layers, checkpointing in (("two", 2, False), ("three", 3, False), ("kept", 3, True)):
        backbone = dataclasses.replace(config.backbone, num_layers=num_layers)
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(torch.bfloat16 if is_half else torch.float32)
            try:
                with torch.device("cuda:0"):
                    model = Generator(dataclasses.replace(config, backbone=backbone), LATENTS)
            finally:
                torch.set_default_dtype(torch.float32)
            model.backbone.activation_checkpointing = checkpointing
            saved[name] = saved_bytes(
                model, partial(forward, model, batch.to(torch.device("cuda:0"))), autocast=is_half
            )

    def estimate(num_layers: int, *, checkpointing: bool = False) -> int:
        backbone = dataclasses.replace(config.backbone, num_layers=num_layers)
        return activation_bytes(
            size,
            dataclasses.replace(config, backbone=backbone),
            CHANNELS,
            precision=precision,
            checkpointing=checkpointing,
        )

    under_way = 2 * (2 if is_half else 4) * WIDE.backbone.mlp_width * size.num_generation
    layer = estimate(3) - estimate(2)
    # Exact but for index tensors and what each image (not token) keeps: its time embedding, 1 % of this small model.
    assert layer == pytest.approx(saved["three"] - saved["two"], rel=0.001)
    assert estimate(3) - under_way == pytest.approx(saved["three"], rel=0.02)
    # The rotary table is held by the layers here, not saved; beside three layers' inputs that is much.
    assert estimate(3, checkpointing=True) - layer - under_way == pytest.approx(saved["kept"], rel=0.1)


@pytest.mark.usefixtures("flash_in_the_head")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_memory_at_its_fullest_is_what_a_step_allocates(checkpointing) -> None:
    batch, model = long_pack(), Generator.create(WIDE, LATENTS, 0)
    model.backbone.activation_checkpointing = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    with TensorBytes(tensor for tensor in state if tensor is not None) as allocated:
        forward(model, batch).sum().backward()
    expected = activation_bytes(
        PackSize.of(batch), WIDE, CHANNELS, precision="fp32", checkpointing=checkpointing
    )
    # 15 %: on a CPU RMSNorm is several operations, which keep its normed input as well.
    assert expected == pytest.approx(allocated.peak, rel=0.15)
