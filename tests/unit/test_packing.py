"""Contract 3: what stands where in a packed batch, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.packing import (
    EditPacker,
    ImageSplit,
    PackingConfig,
    T2IPacker,
    TextSplit,
    build_packed_batch,
)
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from engine.config import UserError

C, Y, X = 3, 2, 2
LATENT = LatentInfo("bf16", (C, Y, X), (0.5, 0.0, -1.0), (2.0, 1.0, 0.5), "autoencoder", "letters")


class Letters:
    """A text tokenizer of one id a letter."""

    vocab_size = 300
    im_start_id, im_end_id, vision_start_id, vision_end_id = 256, 257, 258, 259
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


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


def config(text_dropout: float = 0.0, source_dropout: float = 0.0) -> PackingConfig:
    return PackingConfig(100_000, max_side=4, text_dropout=text_dropout, source_dropout=source_dropout)


def collate(packer: T2IPacker, samples: list[Sample], epoch: int = 0, step: int = 0):  # type: ignore[no-untyped-def]
    return packer.collate(samples, step=step, stream=0, epochs=[epoch] * len(samples), seed=7)


def test_layout_of_a_text_to_image_pack() -> None:
    batch = collate(T2IPacker(config(), LATENT, Letters()), [t2i_sample(1), t2i_sample(23)])
    first, second = [256, *b"n 1", 257], [256, *b"n 23", 257]
    assert batch.text_ids.tolist() == first + second + [258, 259] * 2
    assert batch.text_ids.dtype == torch.int64
    # An image split shares one position, the one after its text.
    assert batch.rope_positions.tolist() == [*range(5), *range(6), 5, 5, 6, 6] + [5] * 4 + [6] * 4
    assert batch.grid_positions.tolist() == [0, 1, 4, 5] * 2
    assert batch.image_index.tolist() == [0] * 4 + [1] * 4
    assert batch.image_noisy.tolist() == [True, True]
    assert batch.loss_mask.all()
    assert batch.num_loss_tokens == 8
    assert batch.sample_ids == ("t1", "t23")
    expected = torch.cat([normalised(latent(number)).permute(1, 2, 0).reshape(-1, C) for number in (1, 23)])
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents, expected)


def test_layout_of_an_edit_pack() -> None:
    batch = collate(EditPacker(config(), LATENT, Letters()), [edit_sample(1)])
    assert batch.text_ids.tolist() == [256, *b"do 1", 257, 258, 259, 258, 259]
    # Source at 0, text from 1 on, target after it. Storage: text, specials of both images, latents of both.
    assert batch.rope_positions.tolist() == [1, 2, 3, 4, 5, 6, 0, 0, 7, 7] + [0] * 4 + [7] * 4
    assert batch.image_noisy.tolist() == [False, True]
    assert batch.loss_mask.tolist() == [False] * 4 + [True] * 4
    assert batch.num_loss_tokens == 4
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
    assert batch.rope_positions.tolist() == [0, 1, 2, 4, 2, 2, 3, 3, 2, 3]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_stored_dtype_is_read(dtype: str) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    values = latent(0).to(torch_dtype)
    payload = values.view(torch.uint8).numpy().tobytes()
    sample = Sample("a", {"latent": payload, "json": b'{"caption": "a"}'})
    batch = collate(T2IPacker(config(), replace(LATENT, dtype=dtype), Letters()), [sample])
    assert torch.equal(batch.latents, normalised(values).flatten(1).T)


def test_condition_dropout_has_the_asked_rates_and_is_keyed_by_sample_and_epoch() -> None:
    packer = EditPacker(config(text_dropout=0.1, source_dropout=0.3), LATENT, Letters())
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
    packer = T2IPacker(config(), LATENT, Letters())
    sample = t2i_sample(0, captions=["a", "bb", "ccc"])
    seen = {bytes(collate(packer, [sample], epoch).text_ids[1:-3].tolist()) for epoch in range(30)}
    assert seen == {b"a", b"bb", b"ccc"}


def test_seed_of_a_pack_is_of_the_step_and_stream() -> None:
    packer = T2IPacker(config(), LATENT, Letters())
    assert collate(packer, [t2i_sample(0)], step=1).seed != collate(packer, [t2i_sample(0)], step=2).seed
    assert collate(packer, [t2i_sample(0)], step=1).seed == collate(packer, [t2i_sample(5)], step=1).seed


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
        (Sample("a", {"latent": bytes(22), "json": b"{}"}), "sample 'a': no part 'latent' of 24 bytes"),
        (edit_sample(3), "sample 'e3': no part 'latent' of 24 bytes"),
    ],
)
def test_bad_sample_is_named(sample: Sample, message: str) -> None:
    with pytest.raises(UserError, match=message):
        collate(T2IPacker(config(), LATENT, Letters()), [sample])


def test_pack_that_outgrows_its_budget_is_refused() -> None:
    packer = T2IPacker(replace(config(), tokens_per_pack=12), LATENT, Letters())
    assert collate(packer, [t2i_sample(1)]).attention.num_tokens == 11
    with pytest.raises(UserError, match="sample 't23' and those packed with it: 24 tokens, more than their"):
        collate(packer, [t2i_sample(23), t2i_sample(45)])


def test_latents_larger_than_the_position_table_are_refused() -> None:
    with pytest.raises(UserError, match=r"do not fit packing.max_side = 1"):
        T2IPacker(PackingConfig(64, max_side=1), LATENT, Letters())


def write(directory: Path, samples: list[Sample], info: LatentInfo | None) -> ShardDataset:
    with ShardWriter(directory, max_samples_per_shard=100, source="test", latent=info) as writer:
        for number, sample in enumerate(samples):
            writer.write(sample, num_image_tokens=4 * (len(sample.parts) - 1), num_text_tokens=3 + number)
    return ShardDataset.open(directory)


def test_lengths_are_those_of_the_packed_batch(tmp_path: Path) -> None:
    t2i, edit = [t2i_sample(1), t2i_sample(23)], [edit_sample(0)]
    packer = T2IPacker(config(), LATENT, Letters())
    lengths = packer.lengths(write(tmp_path / "t2i", t2i, LATENT))
    assert lengths.dtype == np.int64
    assert lengths.sum() == collate(packer, t2i).attention.num_tokens
    edit_packer = EditPacker(config(), LATENT, Letters())
    # The index says 3 text tokens (see `write`), the instruction has 4.
    lengths = edit_packer.lengths(write(tmp_path / "edit", edit, LATENT))
    assert lengths.sum() + 1 == collate(edit_packer, edit).attention.num_tokens


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
        T2IPacker(config(), LATENT, Letters()).lengths(write(tmp_path, [t2i_sample(0)], info))


def test_text_counted_by_another_tokenizer_is_refused(tmp_path: Path) -> None:
    info = replace(LATENT, text_tokenizer_fingerprint="words")
    with pytest.raises(UserError, match="text was counted by another text tokenizer"):
        T2IPacker(config(), info, Letters()).lengths(write(tmp_path, [t2i_sample(0)], info))
