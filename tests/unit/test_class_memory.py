"""The arithmetic of a class-conditional step's memory, against what autograd saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig, WideHeadConfig
from generator.class_conditional.model import new_generator
from generator.class_conditional.sizing import activation_bytes

SHAPE, NUM_IMAGES = (4, 8, 8), 6
LATENTS = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "", "")
PLAIN = DitConfig(num_classes=5, width=128, num_layers=2, num_heads=4)


class FlashLike(torch.autograd.Function):
    """Saves what a fused kernel saves: q, k, v, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors[:3])


def saved_bytes(config: DitConfig, *, autocast: bool, checkpointing: bool) -> int:
    """On fake tensors of a CUDA device, which dispatch and autocast as real ones do and need no GPU."""
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        model = new_generator(config, LATENTS)
        model.activation_checkpointing = checkpointing
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def pack_hook(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        x, t = torch.zeros(NUM_IMAGES, *SHAPE), torch.zeros(NUM_IMAGES)
        torch.set_autocast_enabled("cuda", autocast)  # torch.autocast would ask for a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
                out = model(x, t, torch.zeros(NUM_IMAGES, dtype=torch.int64))
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert out.requires_grad
        weights = 2 * sum(p.numel() for p in model.parameters() if p.ndim > 1)
    # Autocast keeps bf16 copies of the matrices for a step: a share of the weights, not of the images.
    return sum(storage.nbytes() for storage in kept.values()) - (weights if autocast else 0)


@pytest.mark.parametrize("head", [None, WideHeadConfig(256, 2, 4)], ids=["lightning", "wide head"])
@pytest.mark.parametrize("precision", ["bf16_autocast", "fp32"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_memory_of_a_block_is_what_autograd_saves(
    head: WideHeadConfig | None, precision: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", FlashLike.apply)
    few = replace(PLAIN, head=head, qk_norm=qk_norm)
    if head is None:
        more = replace(few, num_layers=3)
    else:
        more = replace(few, head=replace(head, num_layers=3))

    def estimate(config: DitConfig, *, checkpointing: bool = False) -> int:
        return activation_bytes(config, SHAPE, NUM_IMAGES, precision=precision, checkpointing=checkpointing)

    def saved(config: DitConfig, *, checkpointing: bool = False) -> int:
        return saved_bytes(config, autocast=precision != "fp32", checkpointing=checkpointing)

    # Exact but for what each image (not token) keeps, the modulations of LightningDiT: 64 tokens share them.
    block, expected = estimate(more) - estimate(few), saved(more) - saved(few)
    assert block == pytest.approx(expected, rel=0.01)
    # The two ends: a coarse count of a small part, which is a fifth of so small a model.
    assert estimate(few) == pytest.approx(saved(few), rel=0.05)
    if precision == "fp32":  # autocast's copies of the weights are not kept here
        assert estimate(few, checkpointing=True) - block == pytest.approx(
            saved(few, checkpointing=True), rel=0.1
        )
