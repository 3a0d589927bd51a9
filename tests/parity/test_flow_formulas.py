"""The flow's loss, the DDT head and class guidance against their formulas, written out on random weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import TextSplit
from data.shards import LatentInfo
from generator.class_conditional.config import (
    AlignConfig,
    ClassFlowConfig,
    ClassSamplingConfig,
    DitConfig,
    WideHeadConfig,
)
from generator.class_conditional.model import ClassGenerator, create_generator
from generator.class_conditional.objective import build_class_objective
from generator.class_conditional.sampling import sample_class_latents
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig
from generator.model import Generator
from generator.objective import build_objective
from helpers.generators import BACKBONE
from helpers.packs import Splits, image, pack
from helpers.texts import Letters
from helpers.weights import shake

SHAPE = (4, 2, 3)
MEAN, STD = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)
LATENTS = LatentInfo("fp32", SHAPE, MEAN, STD, "autoencoder", "text")
CONFIG = GeneratorConfig(BACKBONE, max_side=4)
HEAD = DdtHeadConfig(width=48, num_layers=2, num_heads=4)
CLASSES = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4)
AUTO_SHIFT = math.sqrt(4 * 2 * 3 / 4096)  # RAE: sqrt(values of a latent / 4096)
SHIFTS = [("auto", AUTO_SHIFT), (6.0, 6.0)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples(*, learns_text: bool = False) -> list[Splits]:
    """A noisy image after a text; a clean image, a text and a noisy image."""
    first, clean, last = (image(seed, noisy=seed != 1, shape=SHAPE) for seed in range(3))
    return [[TextSplit([1, 5, 2], loss=learns_text), first], [clean, TextSplit([1, 2]), last]]


def class_batch() -> ClassBatch:
    return ClassBatch(random(3, *SHAPE, seed=1), torch.tensor([0, 4, 5]), ("a", "b", "c"), seed=7)


def times_and_noise(shift: float, count: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The batch's seed gives n ~ N(0, 1) and then eps; t is s u / (1 + (s - 1) u) of u = 1 / (1 + e^-n)."""
    generator = torch.Generator().manual_seed(7)
    u = 1 / (1 + torch.exp(-torch.randn(count, generator=generator)))
    return shift * u / (1 + (shift - 1) * u), torch.randn(shape, generator=generator)


@pytest.mark.parametrize(("time_shift", "shift"), SHIFTS)
@pytest.mark.parametrize("head", [None, HEAD], ids=["linear", "ddt"])
def test_a_packs_loss_is_the_squared_error_of_the_velocity_on_the_noisy_path(time_shift, shift, head) -> None:
    """x_t = (1 - t) z + t eps, v = eps - z, mean over channels, sum over noisy tokens; clean images stand at t = 0."""
    config = dataclasses.replace(CONFIG, head=head)
    objective = build_objective("t2i", config, FlowConfig(time_shift), LATENTS, Letters(), seed=0)
    shake(objective.model, 1, 0.1)
    batch = pack(samples())
    t, noise = times_and_noise(shift, 2, (12, 4))
    t_T = t.repeat_interleave(6)[:, None]
    clean, z = batch.latents[:6], batch.latents[6:]
    x = torch.cat([clean, (1 - t_T) * z + t_T * noise])
    v = objective.model(batch, x, torch.cat([torch.zeros(1), t]))
    expected = ((v - (noise - z)) ** 2).sum() / 4
    torch.testing.assert_close(objective.loss(batch, 0).loss_sum, expected)


@pytest.mark.parametrize(("time_shift", "shift"), SHIFTS)
@pytest.mark.parametrize("head", [None, WideHeadConfig(48, 1, 4)], ids=["lightning", "wide head"])
@pytest.mark.parametrize(
    "align", [None, AlignConfig(layer=1, weight=0.3, width=24)], ids=["alone", "aligned"]
)
def test_a_batchs_loss_is_the_squared_error_of_the_velocity_on_the_noisy_path(
    time_shift, shift, head, align
) -> None:
    """As above, with the mean over an image's values and the sum over images; `align` takes away its cosines."""
    config = dataclasses.replace(CLASSES, head=head)
    objective = build_class_objective(config, ClassFlowConfig(time_shift, align=align), LATENTS, seed=0)
    shake(objective.model, 1, 0.1)
    batch = class_batch()
    t, noise = times_and_noise(shift, 3, (3, *SHAPE))
    t_B = t[:, None, None, None]
    x = (1 - t_B) * batch.latents + t_B * noise
    v = objective.generator(x, t, batch.labels)
    expected = ((v - (noise - batch.latents)) ** 2).sum() / math.prod(SHAPE)
    output = objective.loss(batch, 0)
    if align is not None:
        expected = expected - 0.3 * output.metrics["alignment"]
    torch.testing.assert_close(output.loss_sum, expected)


def test_a_text_loss_enters_with_its_weight() -> None:
    config = dataclasses.replace(CONFIG, text_output=True)
    flow = FlowConfig(text_loss_weight=0.25)
    objective = build_objective("edit", config, flow, LATENTS, Letters(), seed=0)
    shake(objective.model, 1, 0.1)
    batch = pack(samples(learns_text=True))
    output = objective.loss(batch, 0)
    assert set(output.further) == {"text"} and objective.further_counts(batch) == {"text": 2}
    assert output.further["text"].weight == 0.25
    t, noise = times_and_noise(AUTO_SHIFT, 2, (12, 4))
    t_T, z = t.repeat_interleave(6)[:, None], batch.latents[6:]
    x = torch.cat([batch.latents[:6], (1 - t_T) * z + t_T * noise])
    _, text = objective.model.forward_with_text(batch, x, torch.cat([torch.zeros(1), t]))
    torch.testing.assert_close(output.further["text"].loss_sum, text)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_head(
    w: Mapping[str, Tensor], hidden: Tensor, x: Tensor, t: Tensor, image: Tensor, place: Tensor
) -> Tensor:
    """The DDT head (Wang et al. 2025) token by token and image by image, in the dtype of its weights.

    Tokens: Linear of the noisy latent + time + a row of the 2-D sin-cos table. Condition: SiLU(Linear of the backbone's
    output + time). Layers: LightningDiT's, without rotary places. At the end: norm, times 1 + scale, plus shift.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias")
        product = x @ w[f"{name}.weight"].T
        return product if bias is None else product + bias

    def norm(x: Tensor, name: str | None = None) -> Tensor:
        normed = x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed if name is None else normed * w[f"{name}.weight"]

    width = HEAD.width
    rates = torch.tensor([10_000 ** (-k / 128) for k in range(128)]).to(x)
    waves = torch.cat([torch.cos(t[:, None] * rates), torch.sin(t[:, None] * rates)], 1)
    time = "latent_embedding.time_embedding.mlp"
    time_T = linear(f"{time}.2", silu(linear(f"{time}.0", waves)))[image]
    rates = torch.tensor([10_000 ** (-4 * k / width) for k in range(width // 4)]).to(x)
    axes = [torch.outer(p.to(x), rates) for p in (place % 4, place // 4)]
    table = torch.cat([part for axis in axes for part in (axis.sin(), axis.cos())], 1)
    tokens = linear("latent_embedding.latent_in", x) + time_T + table
    condition = silu(linear("condition", hidden) + time_T)
    for index in range(HEAD.num_layers):
        name = f"layers.{index}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(f"{name}.modulation", condition).chunk(
            6, 1
        )
        q, k, v = linear(f"{name}.qkv_proj", norm(tokens) * (1 + scale_a) + shift_a).chunk(3, 1)
        attended = torch.zeros_like(tokens)
        for rows in (image == one for one in image.unique()):
            for head in torch.arange(width).chunk(HEAD.num_heads):
                q_h = norm(q[rows][:, head], f"{name}.q_norm")
                k_h = norm(k[rows][:, head], f"{name}.k_norm")
                scores = q_h @ k_h.T / math.sqrt(len(head))
                attended[rows.nonzero(), head] = scores.softmax(1) @ v[rows][:, head]
        tokens = tokens + gate_a * linear(f"{name}.o_proj", attended)
        normed = norm(tokens) * (1 + scale_m) + shift_m
        wide = silu(linear(f"{name}.mlp.gate_proj", normed)) * linear(f"{name}.mlp.up_proj", normed)
        tokens = tokens + gate_m * linear(f"{name}.mlp.down_proj", wide)
    shift, scale = linear("modulation", condition).chunk(2, 1)
    return norm(tokens) * (1 + scale) + shift


def test_the_ddt_head_is_its_formula() -> None:
    """Through the whole generator, whose last Linear gives the velocities."""
    model = Generator.create(dataclasses.replace(CONFIG, head=HEAD), LATENTS, 0)
    shake(model, 1, 0.1)
    batch, t = pack(samples()), torch.tensor([0.0, 0.3, 0.9])
    seen: list[Tensor] = []
    assert model.head is not None
    model.head.condition.register_forward_hook(lambda _layer, inputs, _out: seen.append(inputs[0]))
    with torch.no_grad():
        found = model(batch, batch.latents, t)
        w = {name: value.double() for name, value in model.head.state_dict().items()}
        tokens = plain_head(
            w,
            seen[0].double(),
            batch.latents[6:].double(),
            t.double(),
            batch.image_index[6:],
            batch.grid_positions[6:],
        )
        expected = tokens @ model.latent_out.weight.double().T + model.latent_out.bias.double()
    # fp32 against fp64: rounding of two layers, on values of size one.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def models() -> tuple[ClassGenerator, ClassGenerator]:
    """A generator and a weaker one."""
    pair = (
        create_generator(CLASSES, LATENTS, 0),
        create_generator(dataclasses.replace(CLASSES, width=16), LATENTS, 1),
    )
    for seed, model in enumerate(pair):
        shake(model, seed, 0.1)
    return pair


def drawn(
    model: ClassGenerator,
    guide: ClassGenerator | None,
    labels: list[int],
    seeds: list[int],
    config: ClassSamplingConfig,
) -> Tensor:
    """Each image alone, from t = 1 to 0: v_weak + s (v - v_weak), v_weak of the guide with the class or of the model
    without; then times the deviation plus the mean of its channel."""
    shift = AUTO_SHIFT if config.time_shift == "auto" else config.time_shift
    grid = [1 - step / config.num_steps for step in range(config.num_steps + 1)]
    times = [shift * u / (1 + (shift - 1) * u) for u in grid]
    low, high = config.guidance_interval

    def velocity(x: Tensor, t: float, label: int) -> Tensor:
        v = model(x, torch.tensor([t]), torch.tensor([label]))
        if not low < t <= high:
            return v
        if guide is None:
            weak = model(x, torch.tensor([t]), torch.tensor([CLASSES.num_classes]))
        else:
            weak = guide(x, torch.tensor([t]), torch.tensor([label]))
        return weak + config.guidance * (v - weak)

    images = []
    for label, seed in zip(labels, seeds, strict=True):
        x = random(*SHAPE, seed=seed)[None]
        for t, t_next in itertools.pairwise(times):
            v = velocity(x, t, label)
            if config.solver == "heun" and t_next > 0:
                v = (v + velocity(x + (t_next - t) * v, t_next, label)) / 2
            x = x + (t_next - t) * v
        images.append(x[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])
    return torch.stack(images)


@pytest.mark.parametrize("guidance", [1.0, 2.05])
@pytest.mark.parametrize("has_guide", [False, True], ids=["without the class", "weaker model"])
@pytest.mark.parametrize(
    ("solver", "interval", "shift"),
    [("euler", (0.0, 1.0), 3.0), ("heun", (0.3, 0.9), 2.0), ("euler", (0.0, 0.5), "auto")],
)
@torch.no_grad()
def test_a_class_is_drawn_along_the_guided_velocity(
    models, guidance, has_guide, solver, interval, shift
) -> None:
    model, weak = models
    guide = weak if has_guide else None
    config = ClassSamplingConfig(
        num_steps=5,
        solver=solver,
        time_shift=shift,
        guidance=guidance,
        guidance_interval=interval,
        batch_images=2,
    )
    labels, seeds = [4, 0, 2], [11, 12, 13]
    found = sample_class_latents(model, labels, seeds, config, guide)
    expected = drawn(model, guide, labels, seeds, config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32: batches of two against one
    if guidance != 1:
        plain = drawn(model, None, labels, seeds, dataclasses.replace(config, guidance=1.0))
        assert (expected - plain).abs().amax((1, 2, 3)).min() > 0.02  # guidance does something to each
