"""Class-conditional training: batches keyed by the sample, the loss, the start, the arithmetic of its work."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from base.config import ConfigError, UserError
from data.config import ClassPackingConfig, SetConfig, StorageConfig
from data.packs.class_batch import ClassBatch, ClassPacker
from data.plan.mixture import Mixture
from data.plan.stream import PackStream
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from generator.class_conditional.alignment import AlignedGenerator
from generator.class_conditional.config import (
    AlignConfig,
    ClassFlowConfig,
    ClassSamplingConfig,
    DitConfig,
    WideHeadConfig,
)
from generator.class_conditional.layers import patchify, unpatchify
from generator.class_conditional.model import create_generator, load_generator
from generator.class_conditional.objective import ClassPreview, build_class_objective, spread_labels
from generator.class_conditional.sizing import forward_flops, training_flops
from generator.flow import draw_times

SHAPE = (4, 2, 3)
LATENTS = LatentInfo("fp32", SHAPE, (1.0,) * 4, (2.0,) * 4, "autoencoder", "", num_views=2, has_logvar=True)
CONFIG = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4)
WIDE = replace(CONFIG, head=WideHeadConfig(48, 1, 4))


def labelled(index: int, label: object = None) -> Sample:
    """View v of image i has the mean i + v / 2, the log variance 0."""
    views = [[np.full(SHAPE, index + view / 2), np.zeros(SHAPE)] for view in range(2)]
    tree = {"label": index % 5 if label is None else label}
    return Sample(
        f"s{index}", {"latent": np.array(views, "<f4").tobytes(), "json": json.dumps(tree).encode()}
    )


def collate(samples: Sequence[Sample], epoch: int = 0, **settings: object) -> ClassBatch:
    config = ClassPackingConfig(images_per_pack=len(samples), **settings)  # type: ignore[arg-type]
    packer = ClassPacker(config, LATENTS, num_classes=5)
    return packer.collate(samples, step=3, stream=1, epochs=[epoch] * len(samples), seed=0)


def batch(num_images: int = 6, seed: int = 3) -> ClassBatch:
    latents = torch.randn((num_images, *SHAPE), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(num_images) % 6  # 5: no class
    return ClassBatch(latents, labels, tuple(map(str, range(num_images))), seed)


def test_latents_are_normalised_and_every_view_is_met() -> None:
    samples = [labelled(index) for index in range(200)]
    met = collate(samples, class_dropout=0.0)
    assert met.labels.tolist() == [index % 5 for index in range(200)]
    views = (met.latents * 2 + 1).mean((1, 2, 3)) - torch.arange(200)
    assert 70 < int((views == 0.5).sum()) < 130 and set(views.tolist()) == {0.0, 0.5}  # 100 +- 4 sigma
    assert met.latents.shape == (200, *SHAPE) and met.sample_ids[7] == "s7"


def test_dropout_is_keyed_by_the_sample_and_its_epoch_not_by_its_company() -> None:
    samples = [labelled(index) for index in range(400)]
    first, again, later = collate(samples), collate(samples[::-1]), collate(samples, epoch=1)
    dropped = first.labels == 5
    assert 16 < int(dropped.sum()) < 64  # 40 +- 4 sigma
    assert torch.equal(again.labels.flip(0), first.labels)
    assert not torch.equal(later.labels == 5, dropped)


def test_latents_are_drawn_by_their_variance_when_asked() -> None:
    """exp(0 / 2) = 1 before the normalisation by 2."""
    mean, drawn = (
        collate([labelled(i) for i in range(300)], sample_latents=draws) for draws in (False, True)
    )
    assert float((drawn.latents - mean.latents).std()) == pytest.approx(
        0.5, rel=0.05
    )  # 7,200 values: 4 sigma
    with pytest.raises(UserError, match="without a variance"):
        ClassPacker(ClassPackingConfig(1, sample_latents=True), replace(LATENTS, has_logvar=False), 5)


@pytest.mark.parametrize("label", [5, -1, "cat", True, 1.0])
def test_a_bad_label_is_named_even_where_it_is_dropped(label: object) -> None:
    with pytest.raises(UserError, match=r"sample 's3'.*(label|num_classes)"):
        collate([labelled(3, label=label)], class_dropout=0.999)


def test_shards_of_other_latents_are_refused_when_opened(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", max_samples_per_shard=4, source="t", latent=LATENTS) as writer:
        for index in range(8):
            writer.write(labelled(index))
    packer = ClassPacker(ClassPackingConfig(2), replace(LATENTS, tokenizer_fingerprint="other"), 5)
    with pytest.raises(UserError, match="latents differ"):
        packer.lengths(ShardDataset.open(tmp_path / "a"))


def test_an_epoch_holds_every_image_once(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples_per_shard=4, source="t", latent=LATENTS) as writer:
        for index in range(12):
            writer.write(labelled(index))
    mixture = Mixture.open({"": SetConfig(str(tmp_path))}, StorageConfig())
    packer = ClassPacker(ClassPackingConfig(3), LATENTS, 5)
    stream = PackStream(mixture, packer, num_streams=2, seed=0, rank=0, world=1, prefetch_steps=1)
    met = Counter(key for _ in range(2) for pack in stream.next_step() for key in pack.sample_ids)
    stream.close()
    assert met == Counter(f"s{index}" for index in range(12))


def test_at_the_start_velocities_are_zero_and_the_loss_is_that_of_the_target() -> None:
    objective = build_class_objective(CONFIG, ClassFlowConfig(), LATENTS, seed=0)
    met = batch()
    generator = torch.Generator().manual_seed(met.seed)
    draw_times(6, 1.0, generator)
    target = torch.randn(met.latents.shape, generator=generator) - met.latents
    output = objective.loss(met, step=0)
    torch.testing.assert_close(output.loss_sum, target.square().mean((1, 2, 3)).sum())
    assert objective.count(met) == 6


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["lightning", "wide head"])
def test_alignment_adds_minus_the_cosine_with_the_clean_latents_and_is_not_exported(
    config: DitConfig, tmp_path: Path
) -> None:
    latents = replace(LATENTS, shape=(4, 2, 4))
    met = batch()
    met = replace(met, latents=torch.randn((6, 4, 2, 4), generator=torch.Generator().manual_seed(8)))
    plain = build_class_objective(config, ClassFlowConfig(), latents, seed=0).loss(met, 0)
    flow = ClassFlowConfig(align=AlignConfig(layer=1, weight=0.5, width=24))
    objective = build_class_objective(config, flow, latents, seed=0)
    output = objective.loss(met, 0)
    aligned = objective.model
    assert isinstance(aligned, AlignedGenerator)
    tokens = []
    handle = objective.generator.blocks[0].register_forward_hook(lambda *args: tokens.append(args[2]))
    with FlopCounterMode(display=False) as counter:
        assert objective.loss(met, 0).flops == 3 * counter.get_total_flops()
    handle.remove()
    projected = aligned.projection(tokens[0])  # [6, 8, 4]: the channels of every place
    places = met.latents.flatten(2).transpose(1, 2)
    cosine = (projected * places).sum(2) / (projected.norm(dim=2) * places.norm(dim=2))
    torch.testing.assert_close(output.metrics["alignment"], cosine.mean(1).sum())
    torch.testing.assert_close(output.loss_sum, plain.loss_sum - 0.5 * cosine.mean(1).sum())
    output.loss_sum.backward()
    assert all(p.grad is not None for p in aligned.parameters() if p.requires_grad)
    objective.export(tmp_path)
    assert load_generator(tmp_path).config == config
    with pytest.raises(ConfigError, match="has 2 layers"):
        build_class_objective(config, ClassFlowConfig(align=AlignConfig(layer=3)), latents, seed=0)


def test_patches_are_cut_as_they_are_put_together() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatchify(patchify(x, 2), 3, (2, 3), 2), x)


@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["lightning", "wide head"])
def test_every_trained_parameter_is_reached_and_time_class_and_place_matter(config: DitConfig) -> None:
    model = build_class_objective(config, ClassFlowConfig(), LATENTS, seed=0).generator
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    x = torch.randn((1, *SHAPE), generator=noise)

    def velocity(x: Tensor, t: float, label: int) -> Tensor:
        found: Tensor = model(x, torch.tensor([t]), torch.tensor([label]))
        return found

    plain = velocity(x, 0.5, 1)
    for other in (velocity(x, 0.6, 1), velocity(x, 0.5, 5), velocity(x.flip(3), 0.5, 1).flip(3)):
        assert (other - plain).abs().max() > 1e-3
    plain.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_weights_start_from_the_seed_alone_and_load_as_they_were_saved(tmp_path: Path) -> None:
    first, again = (create_generator(CONFIG, LATENTS, seed=1) for _ in range(2))
    other = create_generator(CONFIG, LATENTS, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    bound = math.sqrt(6 / (32 + 96))  # Xavier's range of a 32 -> 96 matrix
    assert 0.9 * bound < float(first.blocks[0].attn.qkv.weight.detach().abs().max()) <= bound
    first.save(tmp_path)
    loaded = load_generator(tmp_path)
    assert loaded.config == CONFIG and loaded.latents == LATENTS
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))


def test_weights_to_start_from_must_fit(tmp_path: Path) -> None:
    create_generator(CONFIG, LATENTS, seed=1).save(tmp_path)
    flow = ClassFlowConfig(init_from=str(tmp_path))
    started = build_class_objective(CONFIG, flow, LATENTS, seed=9).generator
    assert torch.equal(started.t_embedder.W, load_generator(tmp_path).t_embedder.W)
    with pytest.raises(UserError, match="shape differs"):
        build_class_objective(WIDE, flow, LATENTS, seed=0)
    with pytest.raises(UserError, match="statistics"):
        build_class_objective(CONFIG, flow, replace(LATENTS, mean=(0.0,) * 4), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 36}, "multiple"),
        ({"num_classes": 0}, "at least 1"),
        ({"patch": 2, "head": WideHeadConfig()}, "head"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **fields)  # type: ignore[arg-type]


def test_a_patch_must_divide_the_grid() -> None:
    with pytest.raises(ConfigError, match="2x3"):
        create_generator(replace(CONFIG, patch=2), LATENTS, seed=0)


def test_previews_are_rows_of_eight() -> None:
    def decode(latents: Tensor) -> Tensor:
        return torch.full((len(latents), 3, 4, 4), 0.5)

    labels = spread_labels(5, 10)
    assert labels == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4) and spread_labels(1000, 4) == (0, 250, 500, 750)
    preview = ClassPreview(labels, ClassSamplingConfig(num_steps=2, guidance=1.5), decode)
    grid = build_class_objective(CONFIG, ClassFlowConfig(), LATENTS, seed=0, preview=preview).samples()
    assert grid is not None and grid.shape == (8, 32, 3)
    assert (grid[:4] == 128).all() and (grid[4:, :8] == 128).all() and (grid[4:, 8:] == 255).all()


@pytest.mark.parametrize("config", [CONFIG, WIDE, replace(CONFIG, patch=2)], ids=["plain", "head", "patch"])
def test_work_is_what_pytorch_counts(config: DitConfig) -> None:
    shape = (4, 2, 4)
    model = create_generator(config, replace(LATENTS, shape=shape), seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, *shape), torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    assert forward_flops(config, shape, 3) == counter.get_total_flops()
    assert training_flops(config, shape, 3) == 3 * counter.get_total_flops()
