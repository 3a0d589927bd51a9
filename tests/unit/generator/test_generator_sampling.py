"""Sampling: prefix, interval and company change nothing, guidance is the formula, bad input is one line."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

import generator.pipeline as pipeline_module
from base.config import ConfigError, UserError
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.samples.images import fit_image
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from generator.config import FlowConfig, GeneratorConfig
from generator.flow import sampling_times
from generator.guidance import guide
from generator.model import Generator, normalise, unnormalise
from generator.objective import build_objective
from generator.pipeline import Pipeline, read_pixels
from generator.prefix import split_prefix
from generator.sampling import Condition, make_condition, pack_branches, read_conditions, sample_latents
from generator.sampling_config import SamplingConfig
from helpers.generators import BACKBONE
from helpers.texts import Letters

SHAPE = (4, 3, 3)
LATENTS = LatentInfo("fp32", SHAPE, (0.5, -0.5, 0.0, 1.0), (2.0, 1.0, 0.5, 1.0), "autoencoder", "text")
CONFIG = GeneratorConfig(
    backbone=BACKBONE,
    max_side=4,
)
SPECIAL = {"vision_start_id": 28, "vision_end_id": 29, "max_side": CONFIG.max_side}
SAMPLING = SamplingConfig(num_steps=4, text_guidance=3.0, source_guidance=1.5, time_shift=2.0)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Generator:
    """Random everywhere, the head included, and weights large enough that the conditions matter."""
    model = Generator.create(CONFIG, LATENTS, 0)
    with torch.no_grad():
        model.latent_out.weight.copy_(random(4, 32, seed=9) / math.sqrt(32))
        model.backbone.embed_tokens.weight.mul_(50)
    return model


PROMPTS = [make_condition(Letters(), text) for text in ("abc", "defghijklmnop", "q")]
EDITS = [dataclasses.replace(c, sources=(random(*SHAPE, seed=i),)) for i, c in enumerate(PROMPTS)]
SEVERAL = [
    dataclasses.replace(c, sources=tuple(random(*SHAPE, seed=10 * i + n) for n in range(i)))
    for i, c in enumerate(PROMPTS)
]  # none, one and two sources
KINDS = pytest.mark.parametrize(
    "conditions", [PROMPTS, EDITS, SEVERAL], ids=["prompts", "edits", "0, 1 and 2 sources"]
)
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # fp32 sums in another order, amplified by a few guided steps


def by_full_passes(
    model: Generator, conditions: list[Condition], seeds: list[int], sampling: SamplingConfig
) -> Tensor:
    """Reference: every branch a sample of its own, the whole pack anew at every step, guidance written out."""
    target = ImageSplit(torch.zeros(SHAPE), noisy=True)

    def conditional(x: Tensor, t: float, *, sources: bool, text: bool) -> Tensor:
        samples = []
        for condition in conditions:
            clean = [ImageSplit(normalise(z, LATENTS), noisy=False) for z in condition.sources]
            known = [TextSplit(condition.text_ids)] if text else []
            samples.append([*(clean if sources else []), *known, target])
        batch = build_packed_batch(samples, seed=0, sample_ids=[""] * len(samples), **SPECIAL)
        latents = batch.latents.clone()
        latents[len(latents) - batch.num_loss_tokens :] = x.flatten(2).transpose(1, 2).flatten(0, 1)
        with torch.no_grad():
            v = model(batch, latents, torch.where(batch.image_noisy, t, 0.0))
        return v.view(len(conditions), 9, 4).transpose(1, 2).reshape(x.shape)

    def velocity(x: Tensor, t: float) -> Tensor:
        full = conditional(x, t, sources=True, text=True)
        low, high = sampling.guidance_interval
        if not low < t <= high:
            return full
        none = conditional(x, t, sources=False, text=False)
        source = conditional(x, t, sources=True, text=False)
        s_text, s_source = sampling.text_guidance, sampling.source_guidance
        if not any(condition.sources for condition in conditions):
            return none + s_text * (full - none)
        return none + s_source * (source - none) + s_text * (full - source)

    x = torch.stack([random(*SHAPE, seed=seed) for seed in seeds])
    for t, t_next in pairwise(sampling_times(sampling.num_steps, 2.0)):
        v = velocity(x, t)
        if sampling.solver == "heun" and t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return unnormalise(x, LATENTS)


@KINDS
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.5, 0.9)])  # times are 1, 0.86, 0.67, 0.4
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_drawing_equals_full_forward_passes_of_every_branch(model, conditions, interval, solver) -> None:
    sampling = dataclasses.replace(SAMPLING, guidance_interval=interval, solver=solver)
    found = sample_latents(model, conditions, [1, 2, 3], sampling, Letters())
    torch.testing.assert_close(found, by_full_passes(model, conditions, [1, 2, 3], sampling), **TOLERANCE)
    other = sample_latents(model, conditions[::-1], [1, 2, 3], sampling, Letters())
    assert (found - other)[[0, 2]].abs().amax((1, 2, 3)).min() > 0.05  # the conditions do matter


@KINDS
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_an_image_does_not_depend_on_what_it_is_drawn_with(model, conditions, solver) -> None:
    sampling = dataclasses.replace(SAMPLING, solver=solver)
    together = sample_latents(model, conditions, [1, 2, 3], sampling, Letters())
    in_pairs = dataclasses.replace(sampling, batch_images=2)
    torch.testing.assert_close(
        sample_latents(model, conditions, [1, 2, 3], in_pairs, Letters()), together, **TOLERANCE
    )
    for index in range(3):
        alone = sample_latents(model, conditions[index : index + 1], [index + 1], sampling, Letters())
        torch.testing.assert_close(alone[0], together[index], **TOLERANCE)


@KINDS
def test_the_prefix_serves_times_that_need_less_of_it(model, conditions) -> None:
    """Guided by nothing inside the interval, by sources and text outside."""
    sampling = dataclasses.replace(
        SAMPLING, text_guidance=0.0, source_guidance=0.0, guidance_interval=(0.5, 1.0)
    )
    found = sample_latents(model, conditions, [1, 2, 3], sampling, Letters())
    torch.testing.assert_close(found, by_full_passes(model, conditions, [1, 2, 3], sampling), **TOLERANCE)


def test_branches_share_one_prefix_of_sources_and_texts(model) -> None:
    pack = pack_branches(model, EDITS, ("none", "source", "full"), {"none", "source", "full"}, Letters())
    prefix, noisy = split_prefix(pack)
    num_texts, num_sources = sum(len(c.text_ids) for c in EDITS), len(EDITS) * (2 + 9)
    assert prefix.attention.num_tokens == num_texts + num_sources
    assert noisy.num_targets == 3 * len(EDITS)
    _, only_full = split_prefix(pack_branches(model, EDITS, ("full",), {"source", "full"}, Letters()))
    # Row for row the cache of the whole: the same keys, then its own rows.
    wanted = noisy.attention.full.kv_index.split(noisy.attention.full.k_lens)[2]
    found = only_full.attention.full.kv_index.split(only_full.attention.full.k_lens)[0]
    num_prefix = prefix.attention.num_tokens
    assert torch.equal(found[found < num_prefix], wanted[wanted < num_prefix])


def counted_images(model: Generator, conditions: list[Condition], sampling: SamplingConfig) -> list[int]:
    """Noisy images of each forward pass; the first pass is the prefix's."""
    passes: list[int] = []

    def count(_module: object, arguments: tuple[PackedBatch, Tensor, Tensor]) -> None:
        passes.append(arguments[0].num_targets)

    hook = model.register_forward_pre_hook(count)
    try:
        sample_latents(model, conditions, [0] * len(conditions), sampling, Letters())
    finally:
        hook.remove()
    return passes


def test_outside_the_interval_only_the_conditional_branch_is_computed(model) -> None:
    sampling = dataclasses.replace(SAMPLING, guidance_interval=(0.5, 0.9))  # of 1, 0.86, 0.67, 0.4
    assert counted_images(model, EDITS, sampling) == [0, 3, 9, 9, 3]
    assert counted_images(model, PROMPTS, sampling) == [0, 3, 6, 6, 3]
    heun = dataclasses.replace(sampling, solver="heun")
    assert counted_images(model, PROMPTS, heun) == [0, 3, 6, 6, 6, 6, 3, 3]
    never = dataclasses.replace(SAMPLING, guidance_interval=(0.0, 0.1))
    plain = dataclasses.replace(SAMPLING, text_guidance=1.0)
    found, expected = (
        sample_latents(model, PROMPTS, [1, 2, 3], config, Letters()) for config in (never, plain)
    )
    assert torch.equal(found, expected)


def test_sampling_without_any_condition_has_an_empty_prefix(model) -> None:
    unconditional = dataclasses.replace(SAMPLING, text_guidance=0.0)
    first, second = sample_latents(model, PROMPTS[:2], [5, 5], unconditional, Letters())
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)  # same seed, and no text is read


def test_guidance_keeps_fp32_under_autocast(model) -> None:
    """Previews are drawn under autocast: bf16 products of the weights would move every pixel."""
    v = random(2, 3, 9, 4, seed=0)
    weights = {"none": -0.5, "source": -1.5, "full": 3.0}
    renormalised = dataclasses.replace(SAMPLING, renorm="channel")
    expected = guide(v, weights, renormalised)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(guide(v, weights, renormalised), expected)


def test_normalising_is_undone() -> None:
    z = random(2, *SHAPE, seed=3)
    torch.testing.assert_close(unnormalise(normalise(z, LATENTS), LATENTS), z)
    torch.testing.assert_close(normalise(z, LATENTS)[:, 0], (z[:, 0] - 0.5) / 2)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_steps"):
        SamplingConfig(num_steps=0)
    with pytest.raises(UserError, match="empty"):
        make_condition(Letters(), "  ")


def latent_shards(directory: Path, parts: tuple[str, ...], latents: LatentInfo | None) -> ShardDataset:
    """Five samples; the latents of sample i are filled with i."""
    with ShardWriter(directory, max_samples_per_shard=3, source="test", latent=latents) as writer:
        for index in range(5):
            text = json.dumps({"captions": ["abc"[: index % 3 + 1], "zzz"]}).encode()
            stored = np.full(SHAPE, index, "<f4").tobytes()
            writer.write(Sample(str(index), {**dict.fromkeys(parts, stored), "json": text}))
    return ShardDataset.open(directory)


def test_conditions_are_read_from_validation_shards(tmp_path) -> None:
    prompts = read_conditions(latent_shards(tmp_path / "t2i", ("latent",), LATENTS), Letters(), 2)
    assert [c.text_ids for c in prompts] == [(26, 0, 27), (26, 0, 1, 2, 27)]  # samples 0 and 2 of 5
    assert not any(c.sources for c in prompts)
    edit_shards = latent_shards(tmp_path / "edit", ("source.latent", "target.latent"), LATENTS)
    edits = read_conditions(edit_shards, Letters(), 99)
    assert len(edits) == 5
    for index, condition in enumerate(edits):  # raw, as the autoencoder gave them
        torch.testing.assert_close(condition.sources, (torch.full(SHAPE, float(index)),))
    several = latent_shards(
        tmp_path / "several", ("source0.latent", "source1.latent", "target.latent"), LATENTS
    )
    assert [len(c.sources) for c in read_conditions(several, Letters(), 2)] == [2, 2]
    with pytest.raises(UserError, match="pixels, not latents"):
        read_conditions(latent_shards(tmp_path / "pixels", ("png",), None), Letters(), 2)


def test_the_pipeline_refuses_parts_that_do_not_belong_together(model, tmp_path, monkeypatch) -> None:
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    monkeypatch.setattr(pipeline_module, "load_text_tokenizer", lambda name: Letters())
    monkeypatch.setattr(pipeline_module, "fingerprint", lambda directory: "another")
    with pytest.raises(UserError, match="trained with another autoencoder") as error:
        Pipeline.load(tmp_path / "model", "runs/decoder", "runs/text")
    assert str(error.value).startswith("runs/decoder: ")
    monkeypatch.setattr(pipeline_module, "fingerprint", lambda directory: "autoencoder")
    monkeypatch.setattr(Letters, "fingerprint", "another")
    with pytest.raises(UserError, match="trained with another text tokenizer"):
        Pipeline.load(tmp_path / "model", "runs/decoder", "runs/text")


def test_a_trained_model_draws_and_edits_what_the_text_says() -> None:
    """Latents are all +1 for "p" and all -1 for "n"; the edit "o" turns the source into its opposite."""
    neutral = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")
    objective = build_objective("edit", CONFIG, FlowConfig(time_shift=1.0), neutral, Letters(), seed=0)
    optimizer = torch.optim.AdamW([p for p in objective.model.parameters() if p.requires_grad], lr=3e-3)
    signs = {text: make_condition(Letters(), text).text_ids for text in ("p", "n", "o")}
    plus, minus = torch.ones(SHAPE), -torch.ones(SHAPE)
    samples = [
        [TextSplit(signs["p"]), ImageSplit(plus, noisy=True)],
        [TextSplit(signs["n"]), ImageSplit(minus, noisy=True)],
        [ImageSplit(plus, noisy=False), TextSplit(signs["o"]), ImageSplit(minus, noisy=True)],
        [ImageSplit(minus, noisy=False), TextSplit(signs["o"]), ImageSplit(plus, noisy=True)],
    ] * 4
    for step in range(120):
        batch = build_packed_batch(samples, seed=step, sample_ids=["x"] * len(samples), **SPECIAL)
        (objective.loss(batch, step).loss_sum / objective.count(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = SamplingConfig(num_steps=10, text_guidance=1.0, source_guidance=1.0, time_shift=1.0)
    prompts = [Condition(signs["p"]), Condition(signs["n"])]
    edits = [Condition(signs["o"], (plus,)), Condition(signs["o"], (minus,))]
    drawn, edited = (sample_latents(objective.model, c, [0, 1], plain, Letters()) for c in (prompts, edits))
    for found, expected in ((drawn[0], 1), (drawn[1], -1), (edited[0], -1), (edited[1], 1)):
        assert (found - expected).abs().mean() < 0.5  # half way to the mean of both


class HalfAndHalf(torch.nn.Module):
    """A stand-in for the autoencoder: latents are shrunk pixels and back."""

    config = type("Config", (), {"image_px": 12})

    def encode(self, pixels_01: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels_01, 4)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=4.0)


def test_the_pipeline_draws_and_edits_images(model, tmp_path) -> None:
    pipeline = Pipeline(model, HalfAndHalf(), Letters())
    images = pipeline.generate(["abc", "def"], sampling=SAMPLING)
    again = pipeline.generate(["def"], seeds=[1], sampling=SAMPLING)
    assert [image.size for image in images] == [(12, 12)] * 2
    difference = np.asarray(images[1], int) - np.asarray(again[0], int)
    assert np.abs(difference).max() <= 1  # rounding to 8 bits may fall either way
    images[0].save(tmp_path / "apple.png")
    edited = pipeline.edit([tmp_path / "apple.png", images[1]], ["xyz", "a"], sampling=SAMPLING)
    assert [image.mode for image in edited] == ["RGB", "RGB"]
    both = pipeline.edit(
        [[images[0], images[1]], [images[0]]], ["xyz", "xyz"], seeds=[0, 0], sampling=SAMPLING
    )
    assert np.abs(np.asarray(both[1], int) - np.asarray(edited[0], int)).max() <= 1
    assert np.abs(np.asarray(both[0], int) - np.asarray(edited[0], int)).max() > 1  # a second source counts
    assert pipeline.generate([]) == []


def test_sources_of_any_size_are_fitted_as_training_data_is(model) -> None:
    pipeline = Pipeline(model, HalfAndHalf(), Letters())
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 50, 3), np.uint8))
    assert torch.equal(pipeline.read_pixels(large), fit_image(large, 12))
    upright = large.transpose(Image.Transpose.ROTATE_90)
    upright.getexif()[ExifTags.Base.Orientation] = (
        6  # the camera was held sideways: turn it back to look at it
    )
    assert torch.equal(pipeline.read_pixels(upright), fit_image(large, 12))
    assert [image.size for image in pipeline.edit([large], ["abc"], sampling=SAMPLING)] == [(12, 12)]


def test_bad_images_are_one_clear_line(model, tmp_path) -> None:
    pipeline = Pipeline(model, HalfAndHalf(), Letters())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    for image, words in (
        (tmp_path / "broken.png", "broken.png: cannot be read"),
        (tmp_path / "none.png", "none.png: cannot be read"),
        (Image.new("RGB", (1, 1 << 24)), "over the limit"),
    ):
        with pytest.raises(UserError, match=words) as error:
            pipeline.edit([image], ["abc"])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="2 instructions for 1 images"):
        pipeline.edit([Image.new("RGB", (12, 12))], ["a", "b"])
    with pytest.raises(UserError, match="empty"):
        pipeline.generate(["abc", ""])


def test_transparency_is_laid_on_white() -> None:
    assert read_pixels(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), 2).eq(255).all()


def test_guidance_may_be_a_whole_number(model):
    """Callers from Python write text_guidance=3; only configs turn it into 3.0."""
    whole, real = (
        dataclasses.replace(SAMPLING, num_steps=1, text_guidance=guidance) for guidance in (3, 3.0)
    )
    drawn = [sample_latents(model, PROMPTS, [0, 1, 2], config, Letters()) for config in (whole, real)]
    assert torch.equal(*drawn)
