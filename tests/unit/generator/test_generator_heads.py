"""The DDT head and the text loss: what they read, what they start as, and what they cost nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from base.config import ConfigError, UserError
from data.packs.packed_batch import ImageSplit, TextSplit
from data.shards import LatentInfo
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig
from generator.model import Generator
from generator.objective import build_objective
from generator.prefix import PrefixCache, split_prefix
from helpers.generators import BACKBONE
from helpers.packs import image, pack, times_of
from helpers.texts import Letters

SIDE, CHANNELS = 3, 4
PLAIN = GeneratorConfig(backbone=BACKBONE, max_side=4)
WITH_HEAD = dataclasses.replace(PLAIN, head=DdtHeadConfig(width=48, num_layers=2, num_heads=4))
WITH_TEXT = dataclasses.replace(PLAIN, text_output=True)
LATENTS = LatentInfo(
    "fp32", (CHANNELS, SIDE, SIDE), (0.0,) * CHANNELS, (1.0,) * CHANNELS, "autoencoder", "text"
)


SAMPLES: list[list[TextSplit | ImageSplit]] = [
    [TextSplit([1, 5, 6, 7, 2]), image(0, noisy=True)],
    [image(1, noisy=False), TextSplit([1, 9, 8, 2], loss=True), image(2, noisy=True)],
    [TextSplit([1, 4, 2], loss=True), image(3, noisy=True)],
]


def randomised(config: GeneratorConfig) -> Generator:
    """Nothing at zero: a new model's head says v = 0 whatever it is given."""
    model = Generator.create(config, LATENTS, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_new_head_says_zero_and_its_layers_change_nothing() -> None:
    model, batch = Generator.create(WITH_HEAD, LATENTS, 0), pack(SAMPLES)
    assert not model(batch, batch.latents, times_of(batch)).any()
    assert model.head is not None
    x, condition = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for layer in model.head.layers:
        assert torch.equal(layer(x, condition, lambda q, k, v: v), x)


def test_the_head_reads_latents_time_place_and_the_backbone() -> None:
    model, batch = randomised(WITH_HEAD), pack(SAMPLES)
    assert model.head is not None
    hidden = torch.randn(batch.num_loss_tokens, 32, generator=torch.Generator().manual_seed(2))
    first = len(batch.latents) - batch.num_loss_tokens
    inputs = [
        hidden,
        batch.latents[first:],
        times_of(batch),
        batch.image_index[first:],
        batch.grid_positions[first:],
    ]
    before = model.head(*inputs, lambda q, k, v: v)
    for place in (0, 1, 2, 4):
        changed = list(inputs)
        changed[place] = (changed[place] + 1) % 16 if place == 4 else changed[place] + 0.5
        assert (model.head(*changed, lambda q, k, v: v) - before).abs().max() > 1e-3, place


def test_the_head_lets_an_image_see_itself_only() -> None:
    model, batch = randomised(WITH_HEAD), pack(SAMPLES)
    velocity = model(batch, batch.latents, times_of(batch)).unflatten(0, (3, -1))
    rows = batch.image_index == 1  # the noisy image of the first sample
    moved = model(batch, batch.latents + rows[:, None], times_of(batch)).unflatten(0, (3, -1))
    assert (moved - velocity)[0].abs().max() > 1e-3
    assert torch.equal(moved[1:], velocity[1:])


@pytest.mark.parametrize("config", [WITH_HEAD, WITH_TEXT], ids=["head", "text"])
def test_every_trainable_parameter_gets_a_gradient(config) -> None:
    model = randomised(config)
    flow = FlowConfig(text_loss_weight=float(config.text_output))
    objective = build_objective("t2i", config, flow, LATENTS, Letters(), seed=0)
    objective.model.load_state_dict(model.state_dict())
    # also in a pack without a text to predict: another rank's may have one
    for samples in (SAMPLES, SAMPLES[:1]):
        output = objective.loss(pack(samples), 0)
        total = output.loss_sum + sum(term.weight * term.loss_sum for term in output.further.values())
        objective.model.zero_grad()
        total.backward()
        missing = [n for n, p in objective.model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_the_text_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, batch = randomised(WITH_TEXT), pack(SAMPLES)
    times = times_of(batch)
    velocity, loss = model.forward_with_text(batch, batch.latents, times)
    hidden, _ = model._hidden(batch, batch.latents, times, None, text_output=True)
    assert hidden is not None
    logits = hidden @ model.backbone.embed_tokens.weight.T
    # storage order: the texts of the three samples, of 5, 4 and 3 tokens; the first is not predicted
    expected = F.cross_entropy(logits[[5, 6, 7, 9, 10]], torch.tensor([9, 8, 2, 4, 2]), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert len(batch.text_loss_ids) == 5
    silent = dataclasses.replace(PLAIN, text_output=False)
    plain = Generator(silent, LATENTS)
    plain.load_state_dict(model.state_dict())
    # 1e-6: the last layer's attention is padded otherwise
    torch.testing.assert_close(plain(batch, batch.latents, times), velocity, rtol=0, atol=1e-6)


def test_text_output_and_text_loss_go_together() -> None:
    for config, weight, words in (
        (PLAIN, 1.0, "needs generator.text_output"),
        (WITH_TEXT, 0.0, "weight is 0"),
    ):
        with pytest.raises(UserError, match=words):
            build_objective("t2i", config, FlowConfig(text_loss_weight=weight), LATENTS, Letters(), seed=0)


def test_a_head_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 50 in 4 heads"):
        DdtHeadConfig(width=50, num_heads=4)


def test_a_saved_head_is_the_same_head(tmp_path) -> None:
    model, batch = randomised(WITH_HEAD), pack(SAMPLES)
    model.save(tmp_path)
    loaded = Generator.load(tmp_path)
    times = times_of(batch)
    assert torch.equal(loaded(batch, batch.latents, times), model(batch, batch.latents, times))


def test_a_kernel_is_chosen_by_the_head_dim_of_what_it_gets(monkeypatch) -> None:
    """A wide head's heads may be too long for a kernel that suits the backbone's."""
    asked: list[int | None] = []

    def choose(_device: torch.device, _dtype: torch.dtype, _forced: str, head_dim: int | None = None) -> str:
        asked.append(head_dim)
        return "sdpa"

    for module in ("generator.attention", "generator.model", "generator.prefix"):
        monkeypatch.setattr(f"{module}.choose_backend", choose)
    model, batch = randomised(WITH_HEAD), pack(SAMPLES)
    prefix, noisy = split_prefix(batch)
    cache = PrefixCache("auto")
    model(prefix, prefix.latents, times_of(prefix), attention=cache.fill(prefix.attention))
    model(noisy, noisy.latents, times_of(noisy), attention=cache.extend(noisy.attention))
    model(batch, batch.latents, times_of(batch))
    assert set(asked) == {8, 12}, "of the backbone and of the head, never unknown"
