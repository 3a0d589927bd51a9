"""The arithmetic of a step's work, against what PyTorch counts."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.shards import LatentInfo
from generator.heads import DdtHeadConfig
from generator.model import Generator, GeneratorConfig
from generator.mot import MotConfig
from generator.sizing import PackSize, forward_flops, training_flops, typical_pack

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
            model._cross_entropy(hidden[batch.text_loss_rows], batch.text_loss_ids)
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
    backbone = MotConfig(
        vocab_size=151_936,
        width=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=4864,
    )
    config = GeneratorConfig(backbone=backbone, max_side=64, text_output=True)
    size = PackSize(1000, 0, 0, 0, 0, 0, 0, 0)
    layer = 896 * 896 * 2 + 896 * 128 * 2 + 3 * 896 * 4864
    assert forward_flops(size, config, 64) == 2 * 1000 * 24 * layer
    assert 24 * layer == 357_826_560


def test_a_typical_pack_is_made_of_typical_samples() -> None:
    size = typical_pack(3 * (2 * (2 + 9) + 5), 5, (3, 3), num_sources=1)
    assert (size.num_understanding, size.num_generation, size.num_noisy, size.num_images) == (27, 54, 27, 6)
    assert size.noisy_area == 3 * 81
