"""The packed forward pass: attention rule, independence of samples, gradients, saving."""

import dataclasses
import math
import shutil
import sys
import types

import pytest
import torch
from torch import Tensor

from base.config import UserError
from data.packs.packed_batch import ImageSplit, TextSplit
from data.shards import LatentInfo
from generator.attention import attend, choose_backend, planned_attention
from generator.config import GeneratorConfig
from generator.flash import PACKAGES
from generator.model import Generator
from helpers.generators import BACKBONE
from helpers.packs import attend_dense, image, pack, rule_mask, times_of, token_table

SIDE, CHANNELS, VOCAB = 3, 4, 32
CONFIG = GeneratorConfig(backbone=BACKBONE, max_side=4)
LATENTS = LatentInfo(
    "fp32", (CHANNELS, SIDE, SIDE), (0.5,) * CHANNELS, (2.0,) * CHANNELS, "autoencoder", "text"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SAMPLES: list[list[TextSplit | ImageSplit]] = [
    [TextSplit([1, 5, 6, 7, 2]), image(0, noisy=True)],
    [image(1, noisy=False), TextSplit([1, 9, 2]), image(2, noisy=True)],
    [image(3, noisy=True)],
    [
        TextSplit([1, 8, 2]),
        image(4, noisy=True),
        TextSplit([1, 11, 12, 2]),
        image(5, noisy=False),
        image(6, noisy=True),
    ],
]


def model_with_random_head(seed: int = 0) -> Generator:
    """The head of a new model is zero; velocities say something only with a random one."""
    model = Generator.create(CONFIG, LATENTS, seed)
    with torch.no_grad():
        model.latent_out.weight.copy_(random(CHANNELS, BACKBONE.width, seed=99) / math.sqrt(BACKBONE.width))
    return model


def varlen_reference(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
    """What flash-attn's variable-length call promises, segment by segment (causal: bottom right)."""
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    outputs = []
    for s in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(cu_seqlens_q[s], cu_seqlens_q[s + 1]), slice(cu_seqlens_k[s], cu_seqlens_k[s + 1])
        length_q, length_k = q[rows].shape[0], k[keys].shape[0]
        mask = torch.ones(length_q, length_k, dtype=torch.bool)
        outputs.append(
            attend_dense(q[rows], k[keys], v[keys], mask.tril(length_k - length_q) if causal else mask)
        )
    return torch.cat(outputs)


def varlen_attn_reference(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """The same in the signature of torch.nn.attention.varlen."""
    assert enable_gqa and window_size in ((-1, 0), (-1, -1))
    return varlen_reference(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=window_size == (-1, 0),
    )


@pytest.mark.parametrize("backend", ["sdpa", "flash2", "flash3", "flash4", "varlen"])
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[2:3]], ids=["mixed", "no text"])
def test_every_backend_follows_the_rule_and_its_gradient(backend, samples, monkeypatch) -> None:
    # The CUDA kernels are stood in for by what their documentation promises: this tests how they are called
    flash = types.SimpleNamespace(flash_attn_varlen_func=varlen_reference)
    for name in ("flash2", "flash3", "flash4"):
        monkeypatch.setitem(sys.modules, PACKAGES[name].module, flash)
    varlen = types.SimpleNamespace(varlen_attn=varlen_attn_reference)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
    batch = pack(samples)
    total = batch.attention.num_tokens
    q, k, v = (random(total, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2))
    weight = random(total, 4, 8, seed=5)
    expected = attend_dense(q, k, v, rule_mask(token_table(samples)))
    found = attend(q, k, v, batch.attention, backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32 sums in another order
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_backend_follows_the_device_and_a_forced_one_must_run() -> None:
    assert choose_backend(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert choose_backend(torch.device("cuda"), torch.float32) == "sdpa"
    with pytest.raises(UserError, match="attention_backend 'flash' cannot run on cpu"):
        choose_backend(torch.device("cpu"), torch.bfloat16, "flash")


def test_a_sample_has_the_same_velocity_alone_and_in_a_pack() -> None:
    model = model_with_random_head()
    whole = pack(SAMPLES)
    velocity = model(whole, whole.latents, times_of(whole))
    assert velocity.abs().max() > 0.1
    # Which images (clean ones are numbered first) and which noisy ones each sample has.
    images_of, noisy_of = [], []
    num_clean = int((~whole.image_noisy).sum())
    clean, noisy = 0, num_clean
    for sample in SAMPLES:
        images = [split.noisy for split in sample if isinstance(split, ImageSplit)]
        images_of.append(
            [*range(clean, clean + images.count(False)), *range(noisy, noisy + images.count(True))]
        )
        noisy_of.append(range(noisy - num_clean, noisy - num_clean + images.count(True)))
        clean, noisy = clean + images.count(False), noisy + images.count(True)
    velocity_of = velocity.unflatten(0, (-1, SIDE * SIDE))
    for sample, images, outputs in zip(SAMPLES, images_of, noisy_of, strict=True):
        alone = pack([sample])
        found = model(alone, alone.latents, times_of(whole)[images])
        # 1e-5: other paddings, other summation orders
        torch.testing.assert_close(found, velocity_of[list(outputs)].flatten(0, 1), rtol=0, atol=1e-5)


def test_a_noisy_target_is_seen_by_no_later_split_and_clean_ones_are() -> None:
    model = model_with_random_head()
    batch = pack(SAMPLES[3:])  # text, noisy image 1, text, clean image 0, noisy image 2
    before = model(batch, batch.latents, times_of(batch)).unflatten(0, (2, -1))
    for changed, sees in ((1, (True, False)), (0, (False, True))):
        rows = batch.image_index == changed
        after = model(batch, batch.latents + rows[:, None], times_of(batch)).unflatten(0, (2, -1))
        for output, is_seen in enumerate(sees):
            difference = (after - before)[output].abs().max()
            assert (difference > 1e-3) if is_seen else (difference == 0)


def test_the_last_layer_computes_only_what_is_read() -> None:
    model, batch = model_with_random_head(), pack(SAMPLES)
    asked = []

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        asked.append(len(q))
        return attend(q, k, v, batch.attention.of(len(q)), "sdpa")

    short = model(batch, batch.latents, times_of(batch), attention=watch)
    assert asked == [batch.attention.num_tokens, batch.num_loss_tokens]
    x_text = model.backbone.embed_tokens(batch.text_ids)
    x_latent = model.latent_embedding(batch.latents, times_of(batch), batch.image_index, batch.grid_positions)
    whole = model.backbone(
        x_text, x_latent, batch.rope_positions, watch, batch.num_loss_tokens, text_output=True
    )
    assert asked[2:] == [batch.attention.num_tokens] * 2
    torch.testing.assert_close(short, model.latent_out(whole[1]), rtol=0, atol=1e-6)  # other paddings


def test_a_new_model_predicts_zero_velocity() -> None:
    model, batch = Generator.create(CONFIG, LATENTS, 0), pack(SAMPLES)
    assert not model(batch, batch.latents, times_of(batch)).any()


def test_every_trainable_parameter_gets_a_gradient_and_the_rest_need_none() -> None:
    model, batch = (
        model_with_random_head(),
        pack(SAMPLES[2:3]),
    )  # one image, no text: the smallest pack there is
    model(batch, batch.latents, times_of(batch)).sum().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert missing == []
    last = "backbone.layers.1.understanding."
    assert frozen == {"backbone.understanding_norm.weight"} | {
        last + name
        for name in (
            *(
                "q_proj.weight",
                "q_proj.bias",
                "q_norm.weight",
                "o_proj.weight",
                "post_attention_layernorm.weight",
            ),
            *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
        )
    }


@pytest.mark.parametrize("empty", ["understanding", "generation"])
def test_an_expert_without_tokens_still_gets_zero_gradients(empty) -> None:
    backbone = Generator.create(CONFIG, LATENTS, 0).backbone
    counts = {"understanding": 5, "generation": 5} | {empty: 0}
    x_text, x_latent = (random(counts[name], 32) for name in ("understanding", "generation"))

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_dense(q, k, v, torch.ones(5, 5, dtype=torch.bool))

    text, latent = backbone(x_text, x_latent, torch.arange(5), attention, text_output=True)
    (text.sum() + latent.sum()).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and name != "embed_tokens.weight":
            assert parameter.grad is not None, name
            if empty in name:
                assert not parameter.grad.any(), name


def test_activation_checkpointing_changes_no_gradient() -> None:
    batch = pack(SAMPLES)
    gradients = []
    for checkpointing in (False, True):
        model = model_with_random_head()
        model.backbone.activation_checkpointing = checkpointing
        model(batch, batch.latents, times_of(batch)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_positions_keep_fp32_when_the_model_is_cast_to_bf16() -> None:
    model, batch = model_with_random_head(), pack(SAMPLES)
    batch = dataclasses.replace(
        batch, rope_positions=batch.rope_positions + 4001
    )  # not representable in bf16
    exact = model(batch, batch.latents, times_of(batch))
    rounded = model.bfloat16()(batch, batch.latents, times_of(batch))
    assert rounded.dtype == torch.float32
    # bf16 keeps 8 bits: rounding weights and activations stays within a few per cent of the largest value
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_weights_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (Generator.create(CONFIG, LATENTS, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.latent_embedding.latent_in.weight, other.latent_embedding.latent_in.weight)


def test_a_saved_model_is_the_same_model(tmp_path) -> None:
    model, batch = model_with_random_head(), pack(SAMPLES)
    model.save(tmp_path)
    loaded = Generator.load(tmp_path)
    assert (loaded.config, loaded.latents) == (model.config, model.latents)
    times = times_of(batch)
    assert torch.equal(loaded(batch, batch.latents, times), model(batch, batch.latents, times))


def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path) -> None:
    model = Generator.create(CONFIG, LATENTS, 0)
    model.latent_out = torch.nn.Linear(32, CHANNELS + 1)
    model.extra = torch.nn.Linear(1, 1)
    model.save(tmp_path)
    with pytest.raises(UserError, match=r"extra\.weight.*latent_out\.weight") as error:
        Generator.load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        Generator.load(tmp_path / "nowhere")


def test_planned_attention_is_the_batch_default() -> None:
    model, batch = model_with_random_head(), pack(SAMPLES)
    explicit = planned_attention(batch.attention, "sdpa")
    times = times_of(batch)
    assert torch.equal(
        model(batch, batch.latents, times), model(batch, batch.latents, times, attention=explicit)
    )


def test_a_mimetic_start_pulls_keys_and_queries_to_the_values_and_adds_those_unchanged() -> None:
    """W_v = B, with orthonormal rows; W_q and W_k are 3/10 of a random start's and 7/10 of B; W_o gains B^T / 2, shared
    by a key's queries (Trockman and Kolter 2023). Text keeps its random start."""
    random_start, start = (
        Generator.create(dataclasses.replace(CONFIG, init=init), LATENTS, seed=3).backbone.layers
        for init in ("random", "mimetic")
    )
    for before, layer in zip(random_start, start, strict=True):
        for old, new in zip(before.understanding.parameters(), layer.understanding.parameters(), strict=True):
            assert torch.equal(old, new)
        old, new = (
            {name: w.detach() for name, w in x.generation.named_parameters()} for x in (before, layer)
        )
        basis = new["v_proj.weight"].view(2, 8, 32)
        torch.testing.assert_close(
            basis @ basis.mT, torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5
        )  # fp32 QR
        per_query = basis.repeat_interleave(2, dim=0).flatten(0, 1)  # two query heads share a key head
        expected = {
            "k_proj.weight": 0.3 * old["k_proj.weight"] + 0.7 * basis.flatten(0, 1),
            "q_proj.weight": 0.3 * old["q_proj.weight"] + 0.7 * per_query,
            "o_proj.weight": old["o_proj.weight"] + 0.5 / 2 * per_query.T,
        }
        for name in old.keys() - {"v_proj.weight"}:
            torch.testing.assert_close(new[name], expected.get(name, old[name]))


def test_a_mimetic_start_looks_at_the_same_place_of_the_source_image() -> None:
    """From the first step on, as far as the first layer's attention of an untrained model can (chance: 1/9)."""
    source = image(1, noisy=False)
    batch = pack([[source, TextSplit([1, 9, 2]), ImageSplit(source.latents, noisy=True)]])
    num_text = len(batch.text_ids)
    rows, cells = slice(num_text + SIDE * SIDE, None), slice(num_text, num_text + SIDE * SIDE)

    def share_of_same_place(init: str, seed: int) -> float:
        config = dataclasses.replace(CONFIG, init=init, position_max_period=2.0)
        model = Generator.create(config, LATENTS, seed)
        shares = []

        def watch(layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
            keys = k_TKH[cells].repeat_interleave(2, dim=1)
            logits = torch.einsum("tnh,snh->nts", q_TNH[rows], keys) / BACKBONE.head_dim**0.5
            shares.append(logits.softmax(-1).diagonal(dim1=1, dim2=2).mean())
            return torch.zeros_like(q_TNH)

        with torch.no_grad():
            model(batch, batch.latents, torch.tensor([0.0, 0.0]), watch)
        return float(shares[0])

    seeds = range(4)
    random_share = sum(share_of_same_place("random", seed) for seed in seeds) / 4
    mimetic_share = sum(share_of_same_place("mimetic", seed) for seed in seeds) / 4
    assert 0.08 < random_share < 0.14
    assert mimetic_share > 1.5 * random_share


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_layers_change_no_gradient() -> None:
    gradients = []
    for is_compiled in (False, True):
        model = model_with_random_head()
        if is_compiled:
            model.backbone.compile_layers()
        for samples in (SAMPLES, SAMPLES[:1]):  # another number of tokens
            batch = pack(samples)
            model(batch, batch.latents, times_of(batch)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for eager, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
