"""Packing (docs/architecture.md, section 3): what stands where in a packed batch, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.config import ConfigError, UserError
from data.config import PackingConfig
from data.packs.packed_batch import ImageSplit, TextSplit, build_packed_batch
from data.packs.packing import EditPacker, T2IPacker
from data.plan.plan import sample_uniforms
from data.samples.captions import read_captions
from data.samples.latents import read_latents
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from generator.config import FlowConfig, GeneratorConfig, MotConfig
from generator.objective import FlowObjective, build_objective
from helpers.texts import Bytes

C, Y, X = 3, 2, 2
LATENT = LatentInfo("bf16", (C, Y, X), (0.5, 0.0, -1.0), (2.0, 1.0, 0.5), "autoencoder", "letters")


def latent(seed: int) -> torch.Tensor:
    values = torch.randn(C, Y, X, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.bfloat16)


def stored(values: torch.Tensor) -> bytes:
    return values.view(torch.int16).numpy().tobytes()


def normalised(values: torch.Tensor) -> torch.Tensor:
    return (values.float() - torch.tensor(LATENT.mean).view(C, 1, 1)) / torch.tensor(LATENT.std).view(C, 1, 1)


def t2i_sample(number: int, **fields: object) -> Sample:
    tree = fields or {"caption": f"n {number}"}
    return Sample(f"t{number}", {"latent": stored(latent(number)), "json": json.dumps(tree).encode()})


def edit_sample(number: int) -> Sample:
    parts = {"source.latent": stored(latent(number)), "target.latent": stored(latent(number + 1000))}
    return Sample(f"e{number}", {**parts, "json": json.dumps({"instruction": f"do {number}"}).encode()})


def sample_of(key: str, images: dict[str, bytes], fields: dict[str, object]) -> Sample:
    return Sample(key, {**images, "json": json.dumps(fields).encode()})


def many_edit(key: str, num_sources: int, num_targets: int, instruction: str = "do") -> Sample:
    """Latent i is of `latent(i)`, sources first."""
    roles = [f"source{number}" for number in range(num_sources)]
    roles += [f"target{number}" for number in range(num_targets)]
    images = {f"{role}.latent": stored(latent(number)) for number, role in enumerate(roles)}
    return sample_of(key, images, {"instructions": [instruction]})


STORY: list[dict[str, object]] = [
    {"text": "ab"},
    {"image": "image0", "target": True},
    {"image": "image0"},
    {"text": "c", "loss": True},
    {"image": "image1"},
    {"text": "de", "loss": False},
    {"image": "image1", "target": True},
]


def story(key: str = "s") -> Sample:
    images = {f"image{number}.latent": stored(latent(number)) for number in range(2)}
    return sample_of(key, images, {"splits": STORY})


def config(text_dropout: float = 0.0, source_dropout: float = 0.0) -> PackingConfig:
    return PackingConfig(100_000, max_side=4, text_dropout=text_dropout, source_dropout=source_dropout)


def collate(packer: T2IPacker, samples: list[Sample], epoch: int = 0, step: int = 0):  # type: ignore[no-untyped-def]
    return packer.collate(samples, step=step, stream=0, epochs=[epoch] * len(samples), seed=7)


def test_layout_of_a_text_to_image_pack() -> None:
    batch = collate(T2IPacker(config(), LATENT, Bytes()), [t2i_sample(1), t2i_sample(23)])
    first, second = [256, *b"n 1", 257], [256, *b"n 23", 257]
    assert batch.text_ids.tolist() == first + second + [258, 259] * 2
    assert batch.text_ids.dtype == torch.int64
    # An image split shares one position, the one after its text.
    assert batch.rope_positions.tolist() == [*range(5), *range(6), 5, 5, 6, 6] + [5] * 4 + [6] * 4
    assert batch.grid_positions.tolist() == [0, 1, 4, 5] * 2
    assert batch.image_index.tolist() == [0] * 4 + [1] * 4
    assert batch.image_noisy.tolist() == [True, True]
    assert (batch.num_loss_tokens, batch.num_targets) == (8, 2)
    assert batch.sample_ids == ("t1", "t23")
    expected = torch.cat([normalised(latent(number)).permute(1, 2, 0).reshape(-1, C) for number in (1, 23)])
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, expected)


@pytest.mark.parametrize("pads", [False, True])
def test_what_sdpa_needs_is_built_by_the_packer_alone_and_only_if_asked(pads) -> None:
    batch = collate(EditPacker(config(), LATENT, Bytes(), pads_attention=pads), [edit_sample(1)])
    plans = (batch.attention, batch.attention.outputs, batch.noisy_attention)
    assert [plan.has_buckets for plan in plans] == [pads] * 3
    kept = batch.to(torch.device("cpu"))  # what the loop does
    assert kept.attention.has_buckets == pads


def test_layout_of_an_edit_pack() -> None:
    batch = collate(EditPacker(config(), LATENT, Bytes()), [edit_sample(1)])
    assert batch.text_ids.tolist() == [256, *b"do 1", 257, 258, 259, 258, 259]
    # Source at 0, text from 1 on, target after it. Storage: text, specials of both images, latents of both.
    assert batch.rope_positions.tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 7, 7] + [0] * 4 + [7] * 4
    assert batch.image_noisy.tolist() == [False, True]
    assert (batch.num_loss_tokens, batch.num_targets) == (4, 1)
    source, target = (normalised(latent(number)).flatten(1).T for number in (1, 1001))
    assert torch.equal(batch.latents, torch.cat([source, target]))


def test_noisy_image_does_not_move_the_position_on() -> None:
    image = torch.zeros(C, 1, 1)
    splits = [
        TextSplit([9, 9]),
        ImageSplit(image, noisy=True),
        TextSplit([9]),
        ImageSplit(image, noisy=False),
    ]
    batch = build_packed_batch(
        [[*splits, TextSplit([9])]], vision_start_id=1, vision_end_id=2, max_side=4, seed=0, sample_ids=["a"]
    )
    # Storage: texts, specials and then latents of the clean image, which is met last, and of the noisy one.
    assert batch.rope_positions.tolist() == [0, 1, 2, 4, 3, 3, 2, 2, 3, 2]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_stored_dtype_is_read(dtype: str) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    values = latent(0).to(torch_dtype)
    payload = values.view(torch.uint8).numpy().tobytes()
    sample = Sample("a", {"latent": payload, "json": b'{"caption": "a"}'})
    batch = collate(T2IPacker(config(), replace(LATENT, dtype=dtype), Bytes()), [sample])
    assert torch.equal(batch.latents, normalised(values).flatten(1).T)


def test_condition_dropout_has_the_asked_rates_and_is_keyed_by_sample_and_epoch() -> None:
    packer = EditPacker(config(text_dropout=0.1, source_dropout=0.3), LATENT, Bytes())
    samples = [edit_sample(number) for number in range(1000)]
    batch = collate(packer, samples, epoch=3)
    num_texts = len(batch.attention.causal.q_lens)
    num_sources = int((~batch.image_noisy).sum())
    assert abs(num_texts / 1000 - 0.9) < 0.03  # 3 standard deviations of a binomial of 1000
    assert abs(num_sources / 1000 - 0.7) < 0.045
    assert int(batch.image_noisy.sum()) == 1000
    # Independent: 0.1 * 0.3 lose both (sd 5.4); such a sample's target sees only itself, 2 + 4 keys.
    num_unconditional = sum(k_len == 2 + Y * X for k_len in batch.attention.full.k_lens[: num_sources + 1000])
    assert abs(num_unconditional - num_sources - 30) < 17

    def kept(sample: Sample, epoch: int, step: int = 0) -> tuple[int, int]:
        one = collate(packer, [sample], epoch=epoch, step=step)
        return len(one.attention.causal.q_lens), int((~one.image_noisy).sum())

    alone = [kept(sample, epoch=3, step=9) for sample in samples[:200]]
    assert sum(texts for texts, _ in alone) == len(collate(packer, samples[:200], 3).attention.causal.q_lens)
    assert alone != [kept(sample, epoch=4) for sample in samples[:200]]


def test_one_of_several_captions_is_chosen_by_epoch() -> None:
    packer = T2IPacker(config(), LATENT, Bytes())
    sample = t2i_sample(0, captions=["a", "bb", "ccc"])
    seen = {bytes(collate(packer, [sample], epoch).text_ids[1:-3].tolist()) for epoch in range(30)}
    assert seen == {b"a", b"bb", b"ccc"}


def test_seed_of_a_pack_is_of_the_step_and_stream() -> None:
    packer = T2IPacker(config(), LATENT, Bytes())
    assert collate(packer, [t2i_sample(0)], step=1).seed != collate(packer, [t2i_sample(0)], step=2).seed
    assert collate(packer, [t2i_sample(0)], step=1).seed == collate(packer, [t2i_sample(5)], step=1).seed


# Kinds of caption ---------------------------------------------------------------------------------

KINDS = {"short": "s", "long": "ll", "tags": "ttt"}


def weighted(weights: dict[str, float]) -> T2IPacker:
    return T2IPacker(replace(config(), caption_weights=weights), LATENT, Bytes())


def texts(packer: T2IPacker, samples: list[Sample], epoch: int = 0) -> list[bytes]:
    """The caption that each sample got."""
    return [bytes(collate(packer, [sample], epoch).text_ids[1:-3].tolist()) for sample in samples]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"caption": "a"}, ["a"]),
        ({"captions": ["a", "b"]}, ["a", "b"]),
        ({"captions": {"long": "bb", "short": "a"}}, ["bb", "a"]),
        ({"instructions": ["do"], "label": 3}, ["do"]),
    ],
)
def test_captions_are_a_text_a_list_or_named(fields: dict[str, object], expected: list[str]) -> None:
    assert read_captions(t2i_sample(0, **fields)) == expected


def test_kinds_of_caption_are_drawn_alike_or_by_their_weights() -> None:
    samples = [t2i_sample(number, captions=KINDS) for number in range(1000)]
    alike = Counter(texts(weighted({}), samples))
    assert all(abs(alike[text.encode()] - 333) < 45 for text in KINDS.values())  # 3 standard deviations
    counts = Counter(texts(weighted({"tags": 1, "short": 3}), samples))
    assert counts.keys() == {b"s", b"ttt"}, "a kind without a weight is never taken"
    assert abs(counts[b"s"] - 750) < 42
    assert texts(weighted({"short": 6, "tags": 2}), samples[:50]) == texts(
        weighted({"tags": 1, "short": 3}), samples[:50]
    )
    assert texts(weighted({}), samples[:50], epoch=1) != texts(weighted({}), samples[:50], epoch=2)


def test_a_kind_that_a_sample_lacks_leaves_its_share_to_the_others() -> None:
    samples = [t2i_sample(number, captions={"long": "ll", "tags": "ttt"}) for number in range(300)]
    counts = Counter(texts(weighted({"short": 100, "long": 1, "tags": 1}), samples))
    assert abs(counts[b"ll"] - 150) < 27 and counts[b"ll"] + counts[b"ttt"] == 300


@pytest.mark.parametrize("captions", [{"long": "ll"}, ["ll"], {"long": "ll", "short": "s"}])
def test_a_sample_without_a_caption_of_the_asked_kinds_is_named(captions: object) -> None:
    with pytest.raises(
        UserError, match=r"sample 't0': has captions .* none of packing.caption_weights \['short'"
    ):
        collate(weighted({"short": 0, "tags": 1}), [t2i_sample(0, captions=captions)])


@pytest.mark.parametrize(
    "weights", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_weights_that_are_no_proportions_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="caption_weights"):
        replace(config(), caption_weights=weights)


# Views and variances --------------------------------------------------------------------------------

VIEWS = replace(LATENT, dtype="fp32", num_views=3, has_logvar=True)


def viewed_sample(key: str, parts: Sequence[str] = ("latent",), logvar: float = -2.0) -> Sample:
    """View v of part p has the mean 10 v + p everywhere."""
    values = torch.full((len(parts), 3, 2, C, Y, X), logvar)
    values[:, :, 0] = 10.0 * torch.arange(3).view(1, 3, 1, 1, 1) + torch.arange(len(parts)).view(
        -1, 1, 1, 1, 1
    )
    payloads = {part: values[number].numpy().tobytes() for number, part in enumerate(parts)}
    return Sample(key, {**payloads, "json": b'{"caption": "a"}'})


def raw(z: torch.Tensor) -> torch.Tensor:
    """Normalised [..., C] back to what was stored."""
    return z * torch.tensor(LATENT.std) + torch.tensor(LATENT.mean)


def views_of(packer: T2IPacker, samples: list[Sample], epoch: int) -> list[float]:
    return raw(collate(packer, samples, epoch).latents).view(len(samples), -1)[:, 0].tolist()


def test_the_view_is_a_function_of_seed_epoch_and_key_and_every_view_is_met() -> None:
    packer = T2IPacker(config(), VIEWS, Bytes())
    samples = [viewed_sample(f"v{number}") for number in range(300)]
    seen = views_of(packer, samples, epoch=1)
    # Through the statistics and back: roundings of fp32 at 20.
    assert {round(value, 4) for value in seen} == {0.0, 10.0, 20.0}
    assert all(abs([round(value) for value in seen].count(view) - 100) < 25 for view in (0, 10, 20))
    assert views_of(packer, samples[::-1], epoch=1) == seen[::-1]
    assert views_of(packer, samples, epoch=2) != seen


def test_source_and_target_of_an_edit_are_of_one_view() -> None:
    packer = EditPacker(config(), VIEWS, Bytes())
    parts = ("source.latent", "target.latent")
    for number in range(30):
        batch = collate(packer, [viewed_sample(f"e{number}", parts)])
        source, target = raw(batch.latents).view(2, -1)[:, 0].tolist()
        assert target - source == pytest.approx(1, abs=1e-4)


def test_reading_alone_gives_the_first_view_and_the_mean() -> None:
    z = read_latents([viewed_sample("a", ("latent", "other"))], ("other", "latent"), VIEWS)
    assert z.shape == (1, 2, C, Y, X)
    expected = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1).expand(1, 2, C, Y, X)
    torch.testing.assert_close(raw(z.movedim(2, -1)).movedim(-1, 2), expected, rtol=1e-6, atol=1e-6)


def test_every_value_stands_where_it_was_stored() -> None:
    values = torch.randn(2, 3, 2, C, Y, X, generator=torch.Generator().manual_seed(1))
    samples = [Sample(f"s{number}", {"latent": values[number].numpy().tobytes()}) for number in range(2)]
    z = read_latents(samples, ("latent",), VIEWS, views=[2, 1])
    expected = torch.stack([normalised(values[0, 2, 0]), normalised(values[1, 1, 0])])[:, None]
    assert torch.equal(z, expected)


def test_drawn_latents_have_the_stored_variance_and_are_drawn_anew_each_epoch() -> None:
    packer = T2IPacker(replace(config(), sample_latents=True), replace(VIEWS, num_views=1), Bytes())
    logvar = -2.0

    def sample(number: int) -> Sample:
        values = torch.full((1, 2, C, Y, X), logvar)
        values[:, 0] = number
        return Sample(f"d{number}", {"latent": values.numpy().tobytes(), "json": b'{"caption": "a"}'})

    samples = [sample(number) for number in range(400)]
    means = torch.arange(400.0).repeat_interleave(Y * X)[:, None]
    noise = raw(collate(packer, samples).latents) - means
    # 4800 values: the mean deviates by 0.0053, the deviation of 0.3679 by 0.0038 (one standard deviation).
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - np.exp(logvar / 2)) < 0.015
    alone = raw(collate(packer, samples[7:8], step=9).latents) - 7
    assert torch.equal(alone, noise[7 * Y * X : 8 * Y * X]), "the same epoch, another pack and step"
    assert not torch.equal(raw(collate(packer, samples[7:8], epoch=1).latents) - 7, alone)
    mean = T2IPacker(config(), replace(VIEWS, num_views=1), Bytes())
    torch.testing.assert_close(raw(collate(mean, samples).latents), means.expand(-1, C), rtol=1e-6, atol=1e-5)


def test_drawing_needs_stored_variances() -> None:
    with pytest.raises(UserError, match="stored without a variance; encode with logvar: true"):
        T2IPacker(replace(config(), sample_latents=True), LATENT, Bytes())


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (t2i_sample(0, caption=""), "sample 't0': has an empty caption"),
        (t2i_sample(0, caption="  "), "sample 't0': has an empty caption"),
        (t2i_sample(0, captions=[]), "sample 't0': has an empty caption"),
        (t2i_sample(0, captions=["fine", ""]), "sample 't0': has an empty caption"),
        (t2i_sample(0, title="x"), "sample 't0': no json with one of caption"),
        (Sample("a", {"latent": bytes(24), "json": b"{"}), "sample 'a': no json with one of"),
        (
            Sample("a", {"latent": bytes(22), "json": b'{"caption": "a"}'}),
            "sample 'a': no part 'latent' of 24 bytes",
        ),
        (edit_sample(3), "sample 'e3': no text-to-image sample, .* has the images source, target; edits are"),
        (Sample("a", {"json": b'{"caption": "a"}'}), "sample 'a': .* has the images none"),
    ],
)
def test_bad_sample_is_named(sample: Sample, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collate(T2IPacker(config(), LATENT, Bytes()), [sample])


@pytest.mark.parametrize(
    ("parts", "fields", "message"),
    [
        (["latent"], {"caption": "a"}, "sample 'a': no edit, its image has no role; text-to-image is"),
        (["source.latent"], {"instruction": "a"}, "sample 'a': expected one, or source and target; found source"),
        (["image0.latent"], {"splits": [{"image": "image0", "target": True}]}, "sample 'a': \"splits\" has no text"),
        (["source.latent", "target.latent"], {}, "sample 'a': no json with one of caption"),
    ],
)  # fmt: skip
def test_bad_edit_is_named(parts: list[str], fields: dict[str, object], message: str) -> None:
    payloads = {part: stored(latent(0)) for part in parts}
    with pytest.raises(UserError, match=message) as error:
        collate(EditPacker(config(), LATENT, Bytes()), [sample_of("a", payloads, fields)])
    assert str(error.value).count("sample 'a'") == 1


@pytest.mark.parametrize("name", ["tokens_per_pack", "max_side", "draws_per_caption"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; give at least 1"):
        replace(config(), **{name: 0})


def test_pack_that_outgrows_its_budget_is_refused() -> None:
    packer = T2IPacker(replace(config(), tokens_per_pack=12), LATENT, Bytes())
    assert collate(packer, [t2i_sample(1)]).attention.num_tokens == 11
    with pytest.raises(UserError, match="sample 't23' and those packed with it: 24 tokens, more than their"):
        collate(packer, [t2i_sample(23), t2i_sample(45)])


def test_latents_larger_than_the_position_table_are_refused() -> None:
    with pytest.raises(UserError, match=r"do not fit packing.max_side = 1"):
        T2IPacker(PackingConfig(64, max_side=1), LATENT, Bytes())


# Several images -----------------------------------------------------------------------------------


def image_rows(*numbers: int) -> torch.Tensor:
    return torch.cat([normalised(latent(number)).flatten(1).T for number in numbers])


def test_several_sources_come_before_the_instruction_and_several_targets_after_it() -> None:
    batch = collate(EditPacker(config(), LATENT, Bytes()), [many_edit("e", 3, 2)])
    text = [256, *b"do", 257]
    assert batch.text_ids.tolist() == text + [258, 259] * 5
    assert batch.image_noisy.tolist() == [False] * 3 + [True] * 2
    assert torch.equal(batch.latents, image_rows(0, 1, 2, 3, 4))
    # Sources at 0, 1, 2, the text from 3 on; both targets stand where the other one does, for neither sees it.
    assert batch.rope_positions[:4].tolist() == [3, 4, 5, 6]
    assert batch.rope_positions[4:14].tolist() == [0, 0, 1, 1, 2, 2, 7, 7, 7, 7]
    assert set(batch.attention.full.k_lens[3:5]) == {3 * 6 + 4 + 6}


def test_interleaved_sample_is_packed_as_its_splits_say() -> None:
    batch = collate(EditPacker(config(), LATENT, Bytes()), [story()])
    texts = [256, *b"ab", 257, 256, *b"c", 257, 256, *b"de", 257]
    assert batch.text_ids.tolist() == texts + [258, 259] * 4
    # Clean ones first: image0 and image1 as they are seen, then as they are drawn.
    assert batch.image_noisy.tolist() == [False, False, True, True]
    assert torch.equal(batch.latents, image_rows(0, 1, 0, 1))
    assert batch.rope_positions.tolist()[:11] == [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    assert batch.rope_positions.tolist()[11:19] == [4, 4, 8, 8, 4, 4, 13, 13]
    # The text marked "loss" alone is predicted, all of it but its first id.
    assert batch.text_loss_rows.tolist() == [4, 5]
    assert batch.text_loss_ids.tolist() == [*b"c", 257]


def test_samples_of_several_layouts_share_a_pack() -> None:
    samples = [edit_sample(1), many_edit("m", 2, 1), story(), edit_sample(2)]
    packer = EditPacker(config(), LATENT, Bytes())
    together, alone = collate(packer, samples), [collate(packer, [sample]) for sample in samples]
    for is_noisy in (False, True):
        images = [batch.latents[batch.image_noisy[batch.image_index] == is_noisy] for batch in alone]
        found = together.latents[together.image_noisy[together.image_index] == is_noisy]
        assert torch.equal(found, torch.cat(images))
    assert together.attention.attended_area == sum(batch.attention.attended_area for batch in alone)


def test_every_condition_is_dropped_by_a_draw_of_its_own() -> None:
    packer = EditPacker(config(text_dropout=0.2, source_dropout=0.3), LATENT, Bytes())
    kept: Counter[tuple[bool, ...]] = Counter()
    for number in range(1000):
        batch = collate(packer, [many_edit(f"k{number}", 3, 1)])
        clean = batch.latents[: -Y * X].view(-1, Y * X, C)
        sources = [any(torch.equal(one, image_rows(source)) for one in clean) for source in range(3)]
        kept[(*sources, batch.attention.num_causal > 0)] += 1
    rates = (0.7, 0.7, 0.7, 0.8)
    for flags in itertools.product((False, True), repeat=4):
        rate = np.prod([p if flag else 1 - p for p, flag in zip(rates, flags, strict=True)])
        # 4 standard deviations of a binomial of 1000
        assert abs(kept[flags] - 1000 * rate) < 4 * np.sqrt(1000 * rate * (1 - rate)), flags


def test_the_first_text_and_source_are_dropped_by_the_draws_that_edits_always_had() -> None:
    """Of one key: what an edit drops does not change when further sources join, nor with this version."""
    packer = EditPacker(config(text_dropout=0.5, source_dropout=0.5), LATENT, Bytes())
    for number in range(100):
        _, text_draw, source_draw, _ = sample_uniforms(7, 3, f"e{number}")
        one = collate(packer, [edit_sample(number)], epoch=3)
        two = collate(packer, [many_edit(f"e{number}", 2, 1)], epoch=3)
        assert (one.attention.num_causal > 0) == (two.attention.num_causal > 0) == (text_draw >= 0.5)
        assert len(one.image_noisy) == 1 + (source_draw >= 0.5)
        assert (torch.equal(two.latents[: Y * X], image_rows(0))) == (source_draw >= 0.5)


def test_a_text_that_is_learned_is_never_dropped() -> None:
    packer = EditPacker(config(text_dropout=0.5, source_dropout=0.5), LATENT, Bytes())
    batches = [collate(packer, [story()], epoch) for epoch in range(60)]
    assert all(batch.text_loss_ids.tolist() == [*b"c", 257] for batch in batches)
    assert {len(batch.attention.causal.q_lens) for batch in batches} == {1, 2, 3}
    assert all(batch.num_targets == 2 for batch in batches)


# Several draws of a target --------------------------------------------------------------------------


def drawing(num_draws: int, **options: float) -> PackingConfig:
    return replace(config(**options), draws_per_caption=num_draws)


def test_draws_share_prefix_and_position() -> None:
    batch = collate(T2IPacker(drawing(3), LATENT, Bytes()), [t2i_sample(1), t2i_sample(2)])
    assert batch.text_ids.tolist() == [256, *b"n 1", 257, 256, *b"n 2", 257] + [258, 259] * 6
    assert (batch.num_targets, batch.num_loss_tokens) == (6, 24)
    assert torch.equal(batch.latents, image_rows(1, 1, 1, 2, 2, 2))
    assert set(batch.rope_positions[10:].tolist()) == {5}
    assert batch.attention.full.k_lens == (5 + 2 + 4,) * 12, "no draw sees another"


def test_further_draws_go_round_among_the_targets() -> None:
    packer = EditPacker(drawing(4), LATENT, Bytes())
    firsts = Counter()
    for number in range(300):
        batch = collate(packer, [many_edit(f"r{number}", 1, 2)])
        targets = batch.latents[Y * X :].view(5, Y * X, C)
        counts = [sum(torch.equal(one, image_rows(target)) for one in targets) for target in (1, 2)]
        assert sorted(counts) == [2, 3]
        firsts[counts[0]] += 1
    assert abs(firsts[3] - 150) < 35  # 4 standard deviations of a binomial of 300


TINY = MotConfig(
    vocab_size=300, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48
)


def tiny_objective(text_loss_weight: float) -> FlowObjective:
    generator = GeneratorConfig(TINY, max_side=4, text_output=text_loss_weight > 0)
    flow = FlowConfig(text_loss_weight=text_loss_weight)
    objective = build_objective("edit", generator, flow, LATENT, Bytes(), seed=0)
    out = objective.model.latent_out
    # A new model's velocities are zero; these are of order 1.
    torch.nn.init.normal_(out.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return objective


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    samples=st.lists(
        st.sampled_from([many_edit("a", 1, 1), many_edit("b", 2, 1, "make it"), edit_sample(3), edit_sample(44)]),
        min_size=1,
        max_size=3,
    ),
    num_draws=st.integers(2, 4),
    dropout=st.sampled_from([0.0, 0.5]),
    epoch=st.integers(0, 1000),
)  # fmt: skip
def test_several_draws_train_as_so_many_single_samples(
    samples: list[Sample], num_draws: int, dropout: float, epoch: int
) -> None:
    """The same dropout, times and noise: same velocities, loss and gradients as K copies of every sample."""
    rates = {"text_dropout": dropout, "source_dropout": dropout}
    shared = collate(EditPacker(drawing(num_draws, **rates), LATENT, Bytes()), samples, epoch)
    copies = [sample for sample in samples for _ in range(num_draws)]
    single = collate(EditPacker(drawing(1, **rates), LATENT, Bytes()), copies, epoch)
    assert shared.seed == single.seed and shared.num_targets == single.num_targets == len(copies)
    if shared.attention.num_causal or len(shared.image_noisy) > shared.num_targets:
        assert shared.attention.num_tokens < single.attention.num_tokens
    velocities, losses, gradients = [], [], []
    for batch in (shared, single):
        objective = tiny_objective(0.0)
        objective.model.register_forward_hook(lambda _model, _inputs, output: velocities.append(output))
        loss = objective.loss(batch, 0).loss_sum
        loss.backward()
        losses.append(loss.detach())
        trained = [p for p in objective.model.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert velocities[0].std() > 0.1
    # fp32: values of order 1 whose sums are taken in another order, and gradients of sums over all tokens.
    torch.testing.assert_close(velocities[0], velocities[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max())
    )


def test_draws_of_an_interleaved_sample_change_no_text() -> None:
    """Texts after a target do not see it, so its further draws leave their loss as it is."""
    sums = []
    for num_draws in (1, 4):
        batch = collate(EditPacker(drawing(num_draws), LATENT, Bytes()), [story("x")])
        assert batch.num_targets == 2 + num_draws - 1
        output = tiny_objective(1.0).loss(batch, 0)
        sums.append(output.further["text"].loss_sum.detach())
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0)


def write(directory: Path, samples: list[Sample], info: LatentInfo | None) -> ShardDataset:
    with ShardWriter(directory, max_samples_per_shard=100, source="test", latent=info) as writer:
        for number, sample in enumerate(samples):
            writer.write(sample, num_image_tokens=4 * (len(sample.parts) - 1), num_text_tokens=3 + number)
    return ShardDataset.open(directory)


def test_lengths_are_those_of_the_packed_batch(tmp_path: Path) -> None:
    t2i, edit = [t2i_sample(1), t2i_sample(23)], [edit_sample(0)]
    packer = T2IPacker(config(), LATENT, Bytes())
    lengths = packer.lengths(write(tmp_path / "t2i", t2i, LATENT))
    assert lengths.dtype == np.int64
    assert lengths.sum() == collate(packer, t2i).attention.num_tokens
    edit_packer = EditPacker(config(), LATENT, Bytes())
    # The index says 3 text tokens (see `write`), the instruction has 4.
    lengths = edit_packer.lengths(write(tmp_path / "edit", edit, LATENT))
    assert lengths.sum() + 1 == collate(edit_packer, edit).attention.num_tokens


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([-1, 0, 1]))
def test_a_pack_is_full_at_exactly_its_budget(lengths: list[int], extra: int) -> None:
    """One token less than the samples need is refused, even if their index said that they fit."""
    samples = [t2i_sample(number, caption="c" * length) for number, length in enumerate(lengths, start=1)]
    tokens = sum(2 + length + 2 + Y * X for length in lengths)  # text and image, each with start and end
    packer = T2IPacker(PackingConfig(tokens + extra, max_side=4, text_dropout=0.0), LATENT, Bytes())
    if extra >= 0:
        assert collate(packer, samples).attention.num_tokens == tokens
    else:
        with pytest.raises(
            UserError, match=rf"{tokens} tokens, more than their index says \(budget {tokens - 1}\)"
        ):
            collate(packer, samples)


def test_latents_as_large_as_the_position_table_are_the_largest() -> None:
    for side, fits in ((2, True), (3, True), (4, False)):
        wide = replace(LATENT, shape=(C, 1, side))
        if fits:
            T2IPacker(PackingConfig(100, max_side=3), wide, Bytes())
        else:
            with pytest.raises(UserError, match=r"do not fit packing\.max_side = 3"):
                T2IPacker(PackingConfig(100, max_side=3), wide, Bytes())


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "holds pixels, not latents"),
        (replace(LATENT, tokenizer_fingerprint="other"), "latents differ from this run's"),
        (replace(LATENT, std=(1.0, 1.0, 1.0)), "latents differ from this run's"),
    ],
)
def test_shards_of_another_kind_are_refused(tmp_path: Path, info: LatentInfo | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        T2IPacker(config(), LATENT, Bytes()).lengths(write(tmp_path, [t2i_sample(0)], info))


def test_text_counted_by_another_tokenizer_is_refused(tmp_path: Path) -> None:
    info = replace(LATENT, text_tokenizer_fingerprint="words")
    with pytest.raises(UserError, match="text was counted by another text tokenizer"):
        T2IPacker(config(), info, Bytes()).lengths(write(tmp_path, [t2i_sample(0)], info))
