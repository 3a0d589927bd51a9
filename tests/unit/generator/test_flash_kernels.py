"""Planned attention through each variable-length kernel: how it is called, which one is chosen, what its keys cost."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from base.config import UserError
from data.packs.attention_plan import AttentionPlan, Split, build_attention_plan
from data.packs.packed_batch import ImageSplit, TextSplit
from data.shards import LatentInfo
from generator.attention import attend, choose_backend, planned_attention
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from generator.flash import PACKAGES
from generator.gather import gather_rows
from generator.model import Generator
from generator.prefix import PrefixCache, split_prefix
from helpers import packs
from helpers.packs import Splits, attend_dense, rule_mask, token_table

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CUDA = torch.device("cuda:0")
pack = partial(packs.pack, max_side=16)


def text(length: int) -> TextSplit:
    return TextSplit(list(range(length)))


def image(height: int, width: int, *, noisy: bool = False) -> ImageSplit:
    return ImageSplit(torch.zeros(4, height, width), noisy)


def noisy(height: int, width: int) -> ImageSplit:
    return image(height, width, noisy=True)


T2I: list[Splits] = [[text(5), noisy(2, 3)], [text(1), noisy(3, 3), noisy(3, 3)], [noisy(2, 2)]]
EDIT: list[Splits] = [
    [image(2, 2), image(3, 2), text(4), noisy(2, 2)],
    [image(3, 3), noisy(3, 3)],
    [text(3), noisy(1, 1)],
]
TURNS: list[Splits] = [
    [image(2, 2), text(3), noisy(2, 2), image(2, 2), text(2), noisy(2, 2), image(2, 2), text(6), noisy(2, 3)]
]
KINDS = {"t2i": T2I, "edit": EDIT, "turns": TURNS, "no text": [[noisy(2, 2)], [noisy(3, 1)]]}


def by_segments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool) -> Tensor:
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1), cu_k.unfold(0, 2, 1), strict=True):
        mask = torch.ones(int(q1 - q0), int(k1 - k0), dtype=torch.bool)
        outputs.append(
            attend_dense(q[q0:q1], k[k0:k1], v[k0:k1], mask.tril(int(k1 - k0 - q1 + q0)) if causal else mask)
        )
    return torch.cat(outputs)


calls: list[dict[str, Any]] = []
"""What the stand-ins were asked for: cleared by the fixture."""


def flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
           return_attn_probs=False, block_table=None):  # fmt: skip
    """flash-attn 2.8's signature: a tensor."""
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    calls.append({"causal": causal, "deterministic": deterministic})
    return by_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)


def flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
           softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
           window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
           sm_margin=0, return_attn_probs=False):  # fmt: skip
    """flash-attn 3's: a tensor, in its first versions a pair."""
    return flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
                  deterministic=deterministic), None  # fmt: skip


def flash4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
           min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
           softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
           pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
           block_sparse_tensors=None, aux_tensors=None, return_lse=False):  # fmt: skip
    """flash-attn 4's: a pair with the log-sum-exp."""
    return flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
                  deterministic=deterministic)  # fmt: skip


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """torch 2.15's; it reads the switch itself."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    calls.append({"deterministic": torch.are_deterministic_algorithms_enabled()})
    return by_segments(query, key, value, cu_seq_q, cu_seq_k, causal=window_size == (-1, 0))


STAND_INS: dict[str, Callable[..., Any]] = {
    "flash2": flash2,
    "flash3": flash3,
    "flash4": flash4,
    "varlen": varlen_attn,
}


@pytest.fixture(params=STAND_INS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    package = PACKAGES[request.param]
    module = types.SimpleNamespace(**{package.function: STAND_INS[request.param]})
    monkeypatch.setitem(sys.modules, package.module, module)
    calls.clear()
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["free", "deterministic"])
def deterministic(request: pytest.FixtureRequest):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plans(samples: list[Splits]) -> dict[str, tuple[AttentionPlan, Tensor]]:
    """Every plan that a pack brings, with its dense mask."""
    batch, mask = pack(samples), rule_mask(token_table(samples))
    outputs, first = batch.attention.outputs, len(mask) - batch.num_loss_tokens
    assert outputs is not None
    image_of = batch.image_index[len(batch.latents) - batch.num_loss_tokens :]
    return {
        "pack": (batch.attention, mask),
        "outputs": (outputs, mask[first:]),
        "head": (batch.noisy_attention, image_of[:, None] == image_of[None]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_equals_the_dense_reference_on_every_plan(kind, kernel, deterministic) -> None:
    for name, (plan, mask) in plans(KINDS[kind]).items():
        calls.clear()
        num_queries, num_keys = mask.shape
        q = random(num_queries, HEADS, HEAD_DIM, seed=1).requires_grad_()
        k, v = (random(num_keys, KV_HEADS, HEAD_DIM, seed=seed).requires_grad_() for seed in (2, 3))
        weight = random(num_queries, HEADS, HEAD_DIM, seed=4)
        found, expected = attend(q, k, v, plan, kernel), attend_dense(q, k, v, mask)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32 sums in another order
        gradients = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected))
        for ours, dense in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, dense, rtol=0, atol=1e-5)
        assert [call["deterministic"] for call in calls] == [deterministic] * len(calls), name
        assert len(calls) == bool(plan.num_causal) + (plan.num_tokens > plan.num_causal)


def with_kernels(monkeypatch: pytest.MonkeyPatch, capability: int, *names: str) -> None:
    """As on a GPU of this compute capability where these kernels are installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (capability, 0))
    monkeypatch.setattr(
        "generator.flash._installed", lambda module: any(PACKAGES[n].module == module for n in names)
    )
    monkeypatch.setattr("generator.flash._import_problem", lambda _name: None)
    for name in names:
        module = types.SimpleNamespace(**{PACKAGES[name].function: STAND_INS[name]})
        monkeypatch.setitem(sys.modules, PACKAGES[name].module, module)


@pytest.mark.parametrize(
    ("capability", "chosen"), [(8, "flash2"), (9, "flash3"), (10, "flash4"), (11, "flash4"), (12, "flash2")]
)
def test_the_first_kernel_that_runs_is_chosen(capability, chosen, monkeypatch) -> None:
    with_kernels(monkeypatch, capability, *STAND_INS)
    assert choose_backend(CUDA, torch.bfloat16, "auto", 64) == chosen
    assert choose_backend(CUDA, torch.bfloat16, "flash", 64) == chosen


@pytest.mark.usefixtures("deterministic")
def test_a_kernel_whose_gradients_do_not_repeat_is_not_chosen_and_refused_where_forced(
    deterministic, monkeypatch
) -> None:
    with_kernels(monkeypatch, 9, "flash3", "flash2")
    assert choose_backend(CUDA, torch.bfloat16, "auto", 192) == "flash3"
    assert choose_backend(CUDA, torch.bfloat16, "auto", 256) == ("flash2" if deterministic else "flash3")
    old = types.SimpleNamespace(flash_attn_varlen_func=lambda q, k, v, causal=False: q)
    monkeypatch.setitem(sys.modules, PACKAGES["flash2"].module, old)  # before 2.4.1
    if not deterministic:
        assert choose_backend(CUDA, torch.bfloat16, "flash2", 64) == "flash2"
        return
    with pytest.raises(UserError, match="this flash-attn has no deterministic backward pass; use 'auto'"):
        choose_backend(CUDA, torch.bfloat16, "flash2", 64)
    with pytest.raises(UserError, match="its backward pass is not deterministic for head_dim 256"):
        choose_backend(CUDA, torch.bfloat16, "flash3", 256)


key_lists = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key_lists, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_gradient_of_gathered_rows_is_their_exact_sum(keys, dtype) -> None:
    """Also of rows that no segment sees, and of those that many see."""
    splits = [Split(torch.arange(1).numpy(), torch.tensor(rows).numpy()) for rows in keys]
    group = build_attention_plan(len(keys), splits, [], num_rows=32).causal
    x = random(32, KV_HEADS, HEAD_DIM, seed=1).to(dtype).requires_grad_()
    weight = random(len(group.kv_index), KV_HEADS, HEAD_DIM, seed=2).to(dtype)
    found = gather_rows(x, group)
    assert torch.equal(found, x.index_select(0, group.kv_index))
    (gradient,) = torch.autograd.grad(found, x, weight)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = torch.zeros(32, KV_HEADS, HEAD_DIM, dtype=wide).index_add_(0, group.kv_index, weight.to(wide))
    # Sums in one order; bf16 rounds once, half a unit of its 8 bits (the CPU's kernel takes ties up, not to even).
    torch.testing.assert_close(gradient.to(wide), exact, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=0)


def test_gathered_rows_survive_activation_checkpointing() -> None:
    group = pack(EDIT).attention.full
    x = random(group.num_rows, KV_HEADS, HEAD_DIM, seed=1).requires_grad_()
    plain, kept = (
        torch.autograd.grad(out.square().sum(), x)[0]
        for out in (gather_rows(x, group), checkpoint(gather_rows, x, group, use_reentrant=False))
    )
    assert torch.equal(plain, kept)


def test_rows_that_are_a_range_are_not_copied() -> None:
    t2i, edit = pack(T2I), pack(EDIT)
    x = random(t2i.attention.num_tokens, KV_HEADS, HEAD_DIM, seed=1)
    assert gather_rows(x, t2i.attention.causal).data_ptr() == x.data_ptr()
    assert len(gather_rows(x, t2i.attention.causal)) == 6
    own = random(t2i.num_loss_tokens, KV_HEADS, HEAD_DIM, seed=1)
    assert gather_rows(own, t2i.noisy_attention.full).data_ptr() == own.data_ptr()
    for copied in (t2i.attention.full, edit.attention.causal, edit.attention.full):
        assert copied.first_row is None


class Operations(TorchDispatchMode):
    """Names and arguments of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema.arguments
        values = {
            argument.name: argument.default_value for argument in schema if argument.has_default_value()
        }
        values |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        self.seen.append((function._schema.name, values | (kwargs or {})))
        return function(*args, **(kwargs or {}))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for found, arguments in self.seen if found == name]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """Fake tensors on a capability 9 device whose cuDNN would take every call that torch lets it take."""
    if "backend" not in str(torch.ops.torch_attn._varlen_attn.default._schema):
        pytest.skip("before torch 2.15 varlen_attn has no other kernel than flash")
    with_kernels(monkeypatch, 9)
    monkeypatch.setattr("generator.flash._installed", lambda module: module == PACKAGES["varlen"].module)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    for cached in (varlen._cudnn_version_and_major_capability, varlen._should_use_cudnn):
        cached.cache_clear()
    yield
    for cached in (varlen._cudnn_version_and_major_capability, varlen._should_use_cudnn):
        cached.cache_clear()


HEAD_LAYERS = 2
CONFIG = GeneratorConfig(
    backbone=MotConfig(
        vocab_size=32, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96
    ),
    max_side=16,
    head=DdtHeadConfig(width=64, num_layers=HEAD_LAYERS, num_heads=4),
)
LATENTS = LatentInfo("fp32", (4, 4, 4), (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")


def fake_model() -> Generator:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(CUDA):
            model = Generator(CONFIG, LATENTS)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def run_fake(samples: list[Splits], *, training: bool) -> Operations:
    """A training's forward pass, or the two passes of the sampler, under autocast."""
    batch = pack(samples)
    prefix, noisy_part = split_prefix(batch)
    cache = PrefixCache("auto")
    passes = [(prefix, cache.fill), (noisy_part, cache.extend)]
    if training:
        passes = [(batch, lambda plan: planned_attention(plan, "auto"))]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training):
        model = fake_model()
        torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with Operations() as operations:
                for on_cpu, attention in passes:
                    part = on_cpu.to(CUDA)
                    times = torch.zeros(len(part.image_noisy), device=CUDA)
                    velocity = model(part, part.latents, times, attention=attention(part.attention))
                    assert velocity.requires_grad == training
                    assert not any(plan.has_buckets for plan in (part.attention, part.noisy_attention))
        finally:
            torch.set_autocast_enabled("cuda", False)
    return operations


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "sampling"])
def test_torch_takes_its_flash_kernel_for_every_call(kind, training) -> None:
    """Not cuDNN, which builds a graph for the lengths of every new pack (a backward pass takes its forward pass's
    kernel). No bucket is built or moved on the way.
    """
    calls = run_fake(KINDS[kind], training=training).of("torch_attn::_varlen_attn")
    assert {call["backend"] for call in calls} == {SDPBackend.FLASH_ATTENTION.value}
    causal = [call for call in calls if call["is_causal"]]
    # Two layers of the backbone; in the last one only noisy latents ask, in the sampler's prefix none does.
    num_causal, num_full = (1, 2) if training else (1, 2 + (kind in ("edit", "turns")))
    has_text = kind != "no text"
    assert len(causal) == num_causal * has_text
    assert len(calls) - len(causal) == num_full + HEAD_LAYERS


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "varlen"])
def test_no_gradient_of_keys_is_added_by_atomics(name, monkeypatch) -> None:
    with_kernels(monkeypatch, 9, name)
    plan = pack(EDIT).attention
    q = random(plan.num_tokens, HEADS, HEAD_DIM, seed=1).requires_grad_()
    k, v = (random(plan.num_tokens, KV_HEADS, HEAD_DIM, seed=seed).requires_grad_() for seed in (2, 3))
    with Operations() as operations:
        attend(q, k, v, plan, name).sum().backward()
    assert k.grad is not None
    assert [name for name, _ in operations.seen if "index_add" in name or "scatter" in name] == []


def test_sdpa_never_takes_cudnn_for_the_buckets_of_a_pack(monkeypatch) -> None:
    enabled = []
    real = F.scaled_dot_product_attention

    def watch(*tensors: Tensor, **options: Any) -> Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    plan = pack(EDIT).attention
    q, k, v = (random(plan.num_tokens, heads, HEAD_DIM, seed=1) for heads in (HEADS, KV_HEADS, KV_HEADS))
    attend(q, k, v, plan, "sdpa")
    assert enabled == [False] * len(plan.buckets)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_sdpa_alone_has_buckets_built_and_they_are_those_it_asks_for() -> None:
    built, asked = pack(TURNS), pack(TURNS)
    built.build_buckets()
    for ready, plan in (
        (built.attention, asked.attention),
        (built.attention.outputs, asked.attention.outputs),
        (built.noisy_attention, asked.noisy_attention),
    ):
        assert ready.has_buckets
        assert not plan.has_buckets
        moved = ready.to(torch.device("meta"))
        assert moved.has_buckets
        assert moved.out_index.device.type == "meta"
        for ours, wanted in zip(ready.buckets, plan.buckets, strict=True):
            assert torch.equal(ours.q_index, wanted.q_index)
            assert torch.equal(ours.num_visible, wanted.num_visible)
