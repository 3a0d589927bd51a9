"""Attention (docs/architecture.md, section 4): both forms of the plan say exactly what the rule's sentence says."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packs.attention_plan import AttentionPlan, VarlenGroup
from data.packs.packed_batch import ImageSplit, TextSplit, build_packed_batch
from helpers import packs
from helpers.packs import Splits

MAX_SIDE = 8
pack = partial(packs.pack, max_side=MAX_SIDE)
Counts = npt.NDArray[np.int64]


def text(length: int) -> TextSplit:
    return TextSplit(list(range(100, 100 + length)))


def image(height: int, width: int, noisy: bool) -> ImageSplit:
    return ImageSplit(torch.zeros(3, height, width), noisy)


def stored_tokens(samples: list[Splits]) -> list[tuple[int, int, int]]:
    """(sample, split, place in the split) of every row: texts, specials, latents; clean images before noisy ones."""
    texts, specials, latents = [], [], []
    for noisy in (False, True):
        for number, sample in enumerate(samples):
            for order, split in enumerate(sample):
                if isinstance(split, TextSplit):
                    texts += [] if noisy else [(number, order, place) for place in range(len(split.ids))]
                elif split.noisy == noisy:
                    specials += [(number, order, place) for place in range(2)]
                    latents += [(number, order, place) for place in range(split.latents[0].numel())]
    return texts + specials + latents


def dense_rule(samples: list[Splits]) -> npt.NDArray[np.bool_]:
    """Causal inside text splits, full inside image splits, every split sees all earlier splits of its sample
    except noisy targets. Tokens one by one, in storage order."""
    tokens = stored_tokens(samples)
    mask = np.zeros((len(tokens), len(tokens)), bool)
    for q, (q_sample, q_split, q_place) in enumerate(tokens):
        for k, (k_sample, k_split, k_place) in enumerate(tokens):
            if q_sample != k_sample:
                continue
            split = samples[k_sample][k_split]
            if q_split == k_split:
                mask[q, k] = isinstance(split, ImageSplit) or k_place <= q_place
            elif k_split < q_split:
                mask[q, k] = not (isinstance(split, ImageSplit) and split.noisy)
    return mask


def expand_groups(plan: AttentionPlan, num_keys: int) -> Counts:
    """How often each query-key pair is computed by the two variable-length calls."""
    counts = np.zeros((plan.num_tokens, num_keys), np.int64)
    for group, first_row, causal in ((plan.causal, 0, True), (plan.full, plan.num_causal, False)):
        check_lengths(group)
        for segment, (q_len, k_len) in enumerate(zip(group.q_lens, group.k_lens, strict=True)):
            q_start, k_start = int(group.cu_q[segment]), int(group.cu_k[segment])
            keys = group.kv_index[k_start : k_start + k_len].numpy()
            for i in range(q_len):
                seen = keys[: k_len - q_len + i + 1] if causal else keys
                np.add.at(counts[first_row + q_start + i], seen, 1)
    return counts


def check_lengths(group: VarlenGroup) -> None:
    assert group.cu_q.dtype == group.cu_k.dtype == torch.int32
    assert group.cu_q.diff().tolist() == list(group.q_lens)
    assert group.cu_k.diff().tolist() == list(group.k_lens)
    assert (group.max_q, group.max_k) == (max(group.q_lens, default=0), max(group.k_lens, default=0))
    assert len(group.kv_index) == sum(group.k_lens)


def expand_buckets(plan: AttentionPlan, num_keys: int) -> Counts:
    """The same for the padded buckets, read the way an SDPA backend uses them."""
    rows = []
    for bucket in plan.buckets:
        assert bucket.mask.shape == (
            len(bucket.q_index),
            1,
            bucket.q_index.shape[1],
            bucket.kv_index.shape[1],
        )
        assert bucket.mask.any(-1).all(), "a query without a key makes softmax give NaN"
        counts = torch.zeros(*bucket.q_index.shape, num_keys, dtype=torch.int64)
        keys = bucket.kv_index[:, None].expand(bucket.mask[:, 0].shape)
        counts.scatter_add_(2, keys, bucket.mask[:, 0].long())
        rows.append(counts.flatten(0, 1))
    queries = torch.cat([bucket.q_index.flatten() for bucket in plan.buckets])
    valid = torch.cat([bucket.q_valid.flatten() for bucket in plan.buckets])
    assert torch.equal(queries[plan.out_index], torch.arange(plan.num_tokens))
    assert valid[plan.out_index].all()
    assert int(valid.sum()) == plan.num_tokens
    return torch.cat(rows)[plan.out_index].numpy()


def repeated(target: ImageSplit, num_draws: int) -> Splits:
    return [target] * num_draws


def seen(target: ImageSplit) -> Splits:
    """Drawn, and then seen by what follows."""
    return [target, ImageSplit(target.latents, noisy=False)]


def joined(*pieces: Splits) -> Splits:
    return [split for piece in pieces for split in piece]


def some(strategy: st.SearchStrategy[Splits], low: int, high: int) -> st.SearchStrategy[Splits]:
    return st.lists(strategy, min_size=low, max_size=high).map(lambda pieces: joined(*pieces))


def kept_or_not(strategy: st.SearchStrategy[Splits]) -> st.SearchStrategy[Splits]:
    """Condition dropout."""
    return st.one_of(strategy, st.just([]))


sides = st.integers(1, 3)
texts = st.builds(text, st.integers(1, 12))
images = st.builds(image, sides, sides, st.booleans())
clean = st.builds(image, sides, sides, st.just(False))
noisy = st.builds(image, sides, sides, st.just(True))
a_text, a_source = texts.map(lambda split: [split]), clean.map(lambda split: [split])
drawn = st.builds(repeated, noisy, st.integers(1, 4))
any_sample = st.lists(texts | images, min_size=1, max_size=6)
t2i = st.builds(joined, kept_or_not(a_text), drawn)
edit = st.builds(joined, some(kept_or_not(a_source), 1, 3), kept_or_not(a_text), some(drawn, 1, 3))
interleaved = st.builds(
    joined,
    some(st.one_of(a_text, a_source, drawn, noisy.map(seen)), 1, 5),
    a_text,
    drawn,
    kept_or_not(a_text),
)
packs = st.lists(any_sample | t2i | edit | interleaved, min_size=1, max_size=4).filter(
    lambda samples: any(isinstance(split, ImageSplit) for sample in samples for split in sample)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(packs)
def test_plan_equals_the_rule(samples: list[Splits]) -> None:
    plan = pack(samples).attention
    expected = dense_rule(samples)
    np.testing.assert_array_equal(expand_groups(plan, len(expected)), expected)  # each pair exactly once
    np.testing.assert_array_equal(expand_buckets(plan, len(expected)), expected)
    assert plan.attended_area == expected.sum()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(packs)
def test_plans_of_the_last_rows_are_those_of_noisy_latents(samples: list[Splits]) -> None:
    """`outputs` asks for them alone, among all keys; `noisy_attention` keeps each image to itself."""
    batch = pack(samples)
    outputs, within = batch.attention.outputs, batch.noisy_attention
    assert outputs is not None
    num_noisy = batch.num_loss_tokens
    tokens = stored_tokens(samples)[len(batch.rope_positions) - num_noisy :]
    assert all(samples[sample][split].noisy for sample, split, _ in tokens)  # type: ignore[union-attr]
    whole = dense_rule(samples)
    expected = whole[len(whole) - num_noisy :]
    own = np.array([[a[:2] == b[:2] for b in tokens] for a in tokens]).reshape(num_noisy, num_noisy)
    for plan, dense in ((outputs, expected), (within, own)):
        assert plan.num_tokens == num_noisy
        np.testing.assert_array_equal(expand_groups(plan, dense.shape[1]), dense)
        if num_noisy:
            np.testing.assert_array_equal(expand_buckets(plan, dense.shape[1]), dense)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(packs)
def test_positions_run_on_in_text_and_pass_noisy_images_over(samples: list[Splits]) -> None:
    """Text runs on; all tokens of an image share one position; a target takes none."""
    expected = []
    for number, order, place in stored_tokens(samples):
        before = samples[number][:order]
        start = sum(len(s.ids) if isinstance(s, TextSplit) else not s.noisy for s in before)
        expected.append(start + place * isinstance(samples[number][order], TextSplit))
    assert pack(samples).rope_positions.tolist() == expected


def test_queries_of_the_full_group_are_specials_then_latents() -> None:
    plan = pack([[text(3), image(2, 2, True)], [image(2, 3, False), text(4), image(2, 3, True)]]).attention
    assert plan.causal.q_lens == (3, 4)
    assert plan.causal.k_lens == (3, 2 + 6 + 4)
    assert plan.full.q_lens == (2, 2, 2, 6, 4, 6)  # the clean image first
    assert plan.full.k_lens == (8, 3 + 6, 8 + 4 + 8) * 2
    assert plan.num_causal == 7
    assert plan.num_tokens == 7 + 6 + 16


def test_pack_with_every_text_dropped_has_an_empty_causal_group() -> None:
    plan = pack([[image(2, 2, True)]] * 3).attention
    assert (plan.num_causal, plan.causal.q_lens, plan.causal.max_q) == (0, (), 0)
    assert plan.causal.cu_q.tolist() == [0]
    assert len(plan.causal.kv_index) == 0


def realistic_samples(edit: bool) -> list[Splits]:
    """About 32k tokens: 16 x 16 latents, captions of 10 to 200 tokens."""
    lengths = np.random.default_rng(0).integers(10, 200, 60 if edit else 100)
    target = image(16, 16, True)
    source: Splits = [image(16, 16, False)] if edit else []
    return [[*source, text(int(length)), target] for length in lengths]


def test_padding_waste_is_small() -> None:
    """Padded area over the area of the segments without padding; one single bucket would waste 1.4 to 2."""
    for edit in (False, True):
        samples = realistic_samples(edit)
        plan = build_packed_batch(
            samples, vision_start_id=1, vision_end_id=2, max_side=16, seed=0, sample_ids=["x"] * len(samples)
        ).attention
        padded = sum(bucket.q_index.numel() * bucket.kv_index.shape[1] for bucket in plan.buckets)
        texts = sum(q * k for q, k in zip(plan.causal.q_lens, plan.causal.k_lens, strict=True))
        full = sum(q * k for q, k in zip(plan.full.q_lens, plan.full.k_lens, strict=True))
        assert padded / (texts + full) < 1.2
        assert len(plan.buckets) < 30  # each costs one attention call per layer


def test_to_moves_every_tensor() -> None:
    batch = pack([[text(3), image(2, 2, True)]]).to(torch.device("meta"))
    plan = batch.attention
    tensors = [batch.text_ids, batch.latents, batch.rope_positions, batch.grid_positions, batch.image_index]
    tensors += [batch.image_noisy, batch.text_loss_rows, batch.text_loss_ids]
    assert plan.outputs is not None
    for moved in (plan, plan.outputs, batch.noisy_attention):
        tensors.append(moved.out_index)
        for group in (moved.causal, moved.full):
            tensors += [group.cu_q, group.cu_k, group.kv_index]
        for bucket in moved.buckets:
            tensors += [bucket.q_index, bucket.q_valid, bucket.kv_index, bucket.num_visible, bucket.mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
