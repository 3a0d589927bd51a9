"""Each attention kernel that is here, on packs of the paper's size and on odd ones, against a dense fp32 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from data.packs.packed_batch import ImageSplit, TextSplit
from generator.attention import attend
from generator.flash import why_not
from generator.gather import gather_rows
from helpers import packs
from helpers.packs import Splits, attend_dense, rule_mask, token_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = ["flash3", "flash4", "flash2", "varlen", "sdpa"]
PACK_TOKENS = 12_288
pack = partial(packs.pack, max_side=16)


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, head dim."""

    query: int
    kv: int
    dim: int


PAPER = Heads(14, 2, 64)
ODD = [Heads(4, 4, 72), Heads(6, 1, 128), Heads(8, 2, 192), Heads(2, 2, 256)]


def text(length: int) -> TextSplit:
    return TextSplit([0] * length)


def image(side: int, *, noisy: bool = False) -> ImageSplit:
    return ImageSplit(torch.zeros(1, side, side), noisy)


def filled(kind: str) -> list[Splits]:
    """Samples of one kind, up to PACK_TOKENS; captions of 60 to 160 tokens, images of 16 x 16."""
    generator = np.random.default_rng(0)
    samples: list[Splits] = []
    num_tokens = 0
    while True:
        caption = text(int(generator.integers(60, 160)))
        sample = {
            "t2i": [caption, image(16, noisy=True)],
            "edit": [image(16), caption, image(16, noisy=True)],
            "turns": [image(16), caption, image(16, noisy=True), image(16), text(20), image(16, noisy=True)],
        }[kind]
        num_tokens += sum(
            len(split.ids) if isinstance(split, TextSplit) else split.latents.numel() + 2 for split in sample
        )
        if num_tokens > PACK_TOKENS:
            return samples
        samples.append(sample)


ODD_SAMPLES: list[Splits] = [
    [text(1), image(1, noisy=True)],
    [image(3, noisy=True)],
    [image(5), image(1), text(129), image(7, noisy=True), image(7, noisy=True)],
    [text(3), image(2), text(1), image(2, noisy=True), text(2)],
]


def attend_by_sample(q: Tensor, k: Tensor, v: Tensor, samples: list[Splits]) -> Tensor:
    """The rule as a mask, softmax in fp32, sample after sample."""
    table = token_table(samples).to(DEVICE)
    out = torch.zeros_like(q)
    for number in range(len(samples)):
        rows = (table[0] == number).nonzero()[:, 0]
        out = out.index_copy(0, rows, attend_dense(q[rows], k[rows], v[rows], rule_mask(table[:, rows])))
    return out


def inputs(num_tokens: int, heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads.query, heads.kv, heads.kv, heads.query)
    return [
        torch.randn(num_tokens, count, heads.dim, generator=generator).to(DEVICE, dtype) for count in counts
    ]


def with_gradients(attention, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def skip_unless_it_runs(kernel: str, dtype: torch.dtype, head_dim: int) -> None:
    if kernel != "sdpa" and (reason := why_not(kernel, DEVICE, dtype, head_dim)):
        pytest.skip(reason)


def assert_close_by_row(found: Tensor, exact: Tensor, share: float) -> None:
    """Every row's error against its length, or the mean length where that is more: a wrong key shows in its row."""
    exact = exact.flatten(1)
    lengths = exact.norm(dim=1)
    errors = (found.float().flatten(1) - exact).norm(dim=1) / lengths.clamp_min(lengths.mean())
    assert errors.max() < share, f"row {int(errors.argmax())}: {errors.max():.4f}"


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CASES = [pytest.param(filled(kind), PAPER, id=f"{kind}-paper") for kind in ("t2i", "edit", "turns")]
CASES += [
    pytest.param(ODD_SAMPLES, heads, id=f"odd-{heads.query}x{heads.kv}x{heads.dim}")
    for heads in (PAPER, *ODD)
]


@pytest.mark.parametrize(("samples", "heads"), CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_equals_the_dense_reference(kernel, samples, heads) -> None:
    skip_unless_it_runs(kernel, torch.bfloat16, heads.dim)
    plan = pack(samples).attention
    values = inputs(plan.num_tokens, heads, torch.bfloat16)
    found = with_gradients(lambda q, k, v: attend(q, k, v, plan.to(DEVICE), kernel), *values)
    exact = with_gradients(
        lambda q, k, v: attend_by_sample(q, k, v, samples), *(value.float() for value in values)
    )
    for ours, dense in zip(found, exact, strict=True):
        # bf16 keeps 8 bits (0.4 %) of weights, their gradients and results; a key too many or too few is above 10 %.
        assert_close_by_row(ours, dense, 0.02)


def test_sdpa_in_fp32_equals_the_dense_reference() -> None:
    plan = pack(ODD_SAMPLES).attention.to(DEVICE)
    values = inputs(plan.num_tokens, PAPER, torch.float32)
    found = with_gradients(lambda q, k, v: attend(q, k, v, plan, "sdpa"), *values)
    exact = with_gradients(lambda q, k, v: attend_by_sample(q, k, v, ODD_SAMPLES), *values)
    for ours, dense in zip(found, exact, strict=True):
        assert_close_by_row(ours, dense, 0.002)  # TF32 keeps 11 bits, where it is allowed


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["t2i", "edit"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_deterministic_backward_passes_give_equal_bits(kernel, kind) -> None:
    skip_unless_it_runs(kernel, torch.bfloat16, PAPER.dim)
    plan = pack(filled(kind)).attention.to(DEVICE)
    values = inputs(plan.num_tokens, PAPER, torch.bfloat16)
    first, *others = (
        with_gradients(lambda q, k, v: attend(q, k, v, plan, kernel), *values) for _ in range(4)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_gathered_keys_is_summed_in_fp32_and_repeats(dtype) -> None:
    group = pack(filled("turns")).attention.full.to(DEVICE)
    x = inputs(group.num_rows, PAPER, dtype)[1].requires_grad_()
    weight = inputs(len(group.kv_index), PAPER, dtype)[1]
    first, *others = (torch.autograd.grad(gather_rows(x, group), x, weight)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
    exact = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, group.kv_index, weight.double())
    # bf16: one rounding, half a unit of its 8 bits; the sums of up to ten values are in fp32.
    rtol = 2**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(first.double(), exact, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_on_a_new_pack_waits_for_nothing(kernel) -> None:
    skip_unless_it_runs(kernel, torch.bfloat16, PAPER.dim)
    samples = filled("edit")
    values = inputs(pack(samples).attention.num_tokens, PAPER, torch.bfloat16)

    def step(plan) -> None:
        with_gradients(lambda q, k, v: attend(q, k, v, plan, kernel), *values)

    step(pack(samples).attention.to(DEVICE))  # what is built once is built
    plan = pack(samples).attention.to(DEVICE)
    plan.build_buckets()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
