"""Compiled layers: whole graphs that packs of any shape share, and nothing of them in the model itself."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from data.packs.packed_batch import PackedBatch, TextSplit
from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig
from generator.class_conditional.model import create_generator
from generator.config import GeneratorConfig
from generator.joined_products import stacked
from generator.model import Generator
from helpers.generators import BACKBONE
from helpers.packs import image, pack, times_of

TRACED = "aot_eager"  # dynamo and the joint graphs as for kernels, without a C++ compiler
LISTENED = "eager"  # dynamo alone, in a tenth of the time
EXACT = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order: three products or one
SIDE, CHANNELS = 3, 4
CONFIG = GeneratorConfig(backbone=BACKBONE, max_side=4)
LATENTS = LatentInfo("fp32", (CHANNELS, SIDE, SIDE), (0.0,) * CHANNELS, (1.0,) * CHANNELS, "", "")


def model_with_random_head() -> Generator:
    """The head of a new model is zero; velocities say something only with a random one."""
    model = Generator.create(CONFIG, LATENTS, seed=0)
    torch.nn.init.normal_(model.latent_out.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def random_pack(generator: torch.Generator) -> PackedBatch:
    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    samples = []
    for _ in range(1 + draw(4)):
        source = [image(draw(99), noisy=False)] if draw(3) == 0 else []
        samples.append([*source, TextSplit([1] * (2 + draw(6))), image(draw(99), noisy=True)])
    return pack(samples)


def train(model: Generator, batch: PackedBatch) -> Tensor:
    out = model(batch, batch.latents, times_of(batch))
    out.square().sum().backward()
    return out.detach()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_twenty_packs_of_other_shapes_share_four_graphs_and_sampling_four_more(checkpointing) -> None:
    plain, compiled = model_with_random_head(), model_with_random_head()
    compiled.compile_layers(TRACED)
    compiled.backbone.activation_checkpointing = checkpointing
    generator = torch.Generator().manual_seed(0)
    # As many understanding tokens as generation tokens: the compiler must not take this for a rule.
    packs = [pack([[TextSplit([1] * 7), image(0, noisy=True)]]), *(random_pack(generator) for _ in range(20))]
    for number, batch in enumerate(packs):
        torch.testing.assert_close(train(compiled, batch), train(plain, batch), **EXACT)
        if number == 0:  # before and behind the attention, in the last layer and in the others
            assert counters["stats"]["unique_graphs"] == 4
            with torch.no_grad():
                compiled(batch, batch.latents, times_of(batch))
            assert counters["stats"]["unique_graphs"] == 8
        with torch.no_grad():
            compiled(batch, batch.latents, times_of(batch))
    assert counters["stats"]["unique_graphs"] == 8
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_compiled_model_runs_its_own_weights() -> None:
    model = model_with_random_head()
    batch = pack([[TextSplit([1, 5, 2]), image(0, noisy=True)]])
    model.compile_layers(LISTENED)
    before = train(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # its own
        with torch.no_grad():
            for layer in twin.backbone.layers:
                layer.generation.mlp.down_proj.weight.mul_(3)
        plain = Generator.uninitialised(CONFIG, LATENTS)
        plain.load_state_dict(twin.state_dict())
        after = train(twin, batch)
        torch.testing.assert_close(after, train(plain, batch), **EXACT)
        assert (after - before).abs().max() > 1e-2


def test_blocks_of_a_class_model_share_one_graph_and_a_copy_its_own_weights() -> None:
    latents = LatentInfo("fp32", (4, 4, 4), (0.0,) * 4, (1.0,) * 4, "", "")
    config = DitConfig(num_classes=3, width=32, num_layers=3, num_heads=4)
    model = create_generator(config, latents, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1
            )
    plain = copy.deepcopy(model)
    model.compile_layers(LISTENED)
    twin = copy.deepcopy(model)
    for num_images in (3, 2, 5):
        x, times = torch.randn(num_images, 4, 4, 4), torch.rand(num_images)
        labels = torch.arange(num_images) % 3
        torch.testing.assert_close(model(x, times, labels), plain(x, times, labels), **EXACT)
        for copied in (twin, plain):
            with torch.no_grad():
                copied.blocks[0].mlp.w3.weight.mul_(1.5)
        torch.testing.assert_close(twin(x, times, labels), plain(x, times, labels), **EXACT)
        plain.blocks[0].mlp.w3.weight.data.copy_(model.blocks[0].mlp.w3.weight)
        twin.blocks[0].mlp.w3.weight.data.copy_(model.blocks[0].mlp.w3.weight)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_weights_that_lie_one_behind_the_other_are_one_matrix_without_a_copy() -> None:
    linears = [torch.nn.Linear(4, rows, bias=False) for rows in (3, 2, 5)]
    apart = stacked(*linears)
    flat = torch.cat([linear.weight.detach().flatten() for linear in linears])
    for linear, part in zip(linears, torch.split(flat, [12, 8, 20]), strict=True):
        linear.weight.data = part.view(-1, 4)
    whole = stacked(*linears)
    assert whole.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert apart.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()
    torch.testing.assert_close(whole, apart, rtol=0, atol=0)
    scale = torch.arange(40.0).view(10, 4)
    (whole * scale).sum().backward()
    gradients = torch.cat([linear.weight.grad for linear in linears])
    torch.testing.assert_close(gradients, scale, rtol=0, atol=0)


def test_a_pack_too_small_for_the_compiler_runs_as_it_is() -> None:
    model = model_with_random_head()
    model.compile_layers(LISTENED)
    layer, x = model.backbone.layers[0], torch.randn(3, BACKBONE.width)
    rope = torch.ones(3, 1, BACKBONE.head_dim // 2), torch.zeros(3, 1, BACKBONE.head_dim // 2)
    layer(x, x[:0], rope, lambda _layer, q, _k, _v: q)
    assert not counters["stats"]
