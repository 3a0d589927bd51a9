"""Compiled layers at the paper's width on a GPU: against the plain ones, over packs of other shapes."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from generator.mot import Mot, init_weights
from generator.qwen import QWEN2_5_0_5B

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def first_keys(_layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """Stands for the attention: keeps every gradient, costs nothing, and is smooth."""
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    rows = slice(len(k_TKH) - len(q_TNH), None)
    k_TNH, v_TNH = (x[rows].repeat_interleave(repeats, 1) for x in (k_TKH, v_TKH))
    return v_TNH * torch.sigmoid((q_TNH * k_TNH).sum(-1, keepdim=True) / q_TNH.shape[-1] ** 0.5)


def step(model: Mot, num_text: int, num_latents: int, num_outputs: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator("cuda").manual_seed(num_text)
    x = torch.randn(num_text + num_latents, model.config.width, device="cuda", generator=generator)
    x = x.to(model.embed_tokens.weight.dtype)
    positions = torch.arange(len(x), device="cuda")
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        _, out = model(x[:num_text], x[num_text:], positions, first_keys, num_outputs)
    assert out.dtype == torch.bfloat16 or x.dtype == torch.float32
    out.float().square().sum().backward()
    return out.detach().float(), [p.grad.float() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "bf16_autocast"])
def test_compiled_layers_are_the_plain_ones_over_packs_of_any_shape(weights, checkpointing) -> None:
    torch.compiler.reset()
    counters.clear()
    plain = Mot(dataclasses.replace(QWEN2_5_0_5B, vocab_size=8, num_layers=2))
    init_weights(plain, torch.Generator().manual_seed(0))
    plain = plain.to("cuda", weights)
    compiled = copy.deepcopy(plain)
    compiled.compile_layers()
    compiled.activation_checkpointing = checkpointing
    for number, sizes in enumerate([(3686, 8602, 8602), (100, 258, 258), (258, 258, 256), (2, 2048, 1024)]):
        (ours, gradients), (theirs, expected) = step(compiled, *sizes), step(plain, *sizes)
        # bf16 has 8 bits: fused kernels round once where the plain ones round after each operation.
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        for gradient, reference in zip(gradients, expected, strict=True):
            assert (gradient - reference).norm() <= 0.05 * reference.norm()
        if number == 0:
            num_graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == num_graphs == 4
    assert not counters["graph_break"]
