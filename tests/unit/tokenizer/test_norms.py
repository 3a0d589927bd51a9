"""Norms keep the dtype of the activations, under CUDA's autocast too, whose list would make them fp32."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenizer.norms import GroupNorm, LayerNorm, RmsNorm, replace_norms

NORMS = {
    "rms": partial(RmsNorm, 8),
    "layer": partial(LayerNorm, 8),
    "group": partial(GroupNorm, 2, 8),
    "rms without weight": partial(RmsNorm, 8, elementwise_affine=False),
}


@pytest.fixture
def cuda_autocast():
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask for a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("cuda_autocast")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_a_norm_gives_the_dtype_it_takes_on_a_gpu(build, activations, weights) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        assert build(dtype=weights)(torch.empty(4, 8, dtype=activations)).dtype == activations


@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_a_norm_of_fp32_is_torchs_to_the_bit(build) -> None:
    ours = build()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 8)
    assert torch.equal(ours(x), type(ours).__mro__[1].forward(ours, x))


@pytest.mark.usefixtures("cuda_autocast")
def test_a_librarys_norms_are_replaced_under_their_names_and_with_their_weights() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool="")
    before = dict(vit.named_parameters())
    replace_norms(vit)
    assert {name: id(p) for name, p in vit.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert all(isinstance(x, LayerNorm) for x in vit.modules() if isinstance(x, nn.LayerNorm))
    assert vit.norm.eps == 1e-6
