"""LightningDiT and DiTDH against RAE's code (bytetriper/RAE, commit a4d18c4) and against their plain formulas.

tests/golden/dit_forward.json is what that code computed, on a CPU in fp32, with the weights and latents of `wave`
below, at times 0.3 and 0.85, for a class and for "no class"; and the norms of all gradients of one weighted sum.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.plain_dit import PlainShape, plain_velocity
from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig, WideHeadConfig
from generator.class_conditional.model import ClassGenerator, create_generator

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dit_forward.json").read_text())
CHANNELS, SIDE, NUM_CLASSES = 6, 4, 3
CONFIGS = {
    "lightning_dit": DitConfig(NUM_CLASSES, 48, 2, 3),
    "lightning_dit_patch_2": DitConfig(NUM_CLASSES, 48, 2, 3, patch=2, qk_norm=False),
    "dit_dh": DitConfig(NUM_CLASSES, 48, 2, 3, qk_norm=False, head=WideHeadConfig(64, 2, 4)),
    "dit_dh_qk_norm": DitConfig(NUM_CLASSES, 48, 2, 3, head=WideHeadConfig(64, 1, 4)),
    "dit_dh_same_width": DitConfig(NUM_CLASSES, 48, 1, 3, head=WideHeadConfig(48, 1, 2)),
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a size that keeps activations near one, the same on every machine and for every library."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000 / 1000 * 2 * math.pi
    values = torch.sin(places * 1.7 + phase) + torch.cos(places * places * 0.37 + 2 * phase)
    if "norm" in name:
        values = 1 + 0.1 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    elif not name.endswith(".W"):
        values = values / math.sqrt(math.prod(shape[1:]))
    return values.reshape(shape).float()


def wavy(config: DitConfig, grid: tuple[int, int] = (SIDE, SIDE)) -> ClassGenerator:
    latents = LatentInfo("fp32", (CHANNELS, *grid), (0.0,) * CHANNELS, (1.0,) * CHANNELS, "", "")
    model = create_generator(config, latents, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(wave(name, tuple(parameter.shape)))
    return model


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_have_the_names_of_the_published_code(name: str) -> None:
    theirs = {key: shape for key, shape in GOLDEN[name]["parameters"].items() if "_rope." not in key}
    ours = {key: list(value.shape) for key, value in wavy(CONFIGS[name]).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("name", GOLDEN)
def test_velocities_and_gradients_are_those_of_the_published_code(name: str) -> None:
    model = wavy(CONFIGS[name])
    x = wave("x", (2, CHANNELS, SIDE, SIDE))
    velocity = model(x, torch.tensor([0.3, 0.85]), torch.tensor([1, NUM_CLASSES]))
    # fp32 rounding of two to four layers, relative to values of size one.
    expected = torch.tensor(GOLDEN[name]["output"]).view_as(velocity)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    (velocity * wave("cotangent", tuple(velocity.shape))).sum().backward()
    norms = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(GOLDEN[name]["gradient_norms"], rel=2e-4, abs=1e-6)  # as above


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)], ids=["square", "wide"])
def test_velocities_are_those_of_the_plain_formulas(name: str, grid: tuple[int, int]) -> None:
    config = CONFIGS[name]
    model = wavy(config, grid)
    x, t, labels = wave("x", (2, CHANNELS, *grid)), torch.tensor([0.1, 0.97]), torch.tensor([0, NUM_CLASSES])
    head = config.head
    shape = PlainShape(
        config.num_layers,
        config.num_heads,
        config.patch,
        0 if head is None else head.num_layers,
        0 if head is None else head.num_heads,
    )
    weights = {key: value.detach().double() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = plain_velocity(weights, shape, x.double(), t.double(), labels)
        found = model(x, t, labels)
    # fp32 against fp64: rounding of a few layers.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


def test_recomputed_activations_change_no_gradient() -> None:
    gradients = []
    for recomputes in (False, True):
        model = wavy(CONFIGS["dit_dh"])
        model.activation_checkpointing = recomputes
        x = wave("x", (2, CHANNELS, SIDE, SIDE))
        model(x, torch.tensor([0.3, 0.85]), torch.tensor([1, 2])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)  # the same operations
