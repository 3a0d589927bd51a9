"""What a tokenizer stage does on a GPU, without one: every operator is recorded, on fake or meta tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from base.objective import LossOutput
from data.samples.images import PixelBatch
from helpers import stages
from helpers.stages import BRIDGE, PLAIN, VIT
from tokenizer import frozen
from tokenizer.config import RepresentationConfig
from tokenizer.representation import Representation
from tokenizer.training import adaptive, image_loss, objective_base
from tokenizer.training.build_stage import build_stage, build_untrained
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.training.stage_config import PerceptualConfig

CUDA = torch.device("cuda", 0)
PIVOT = dataclasses.replace(
    stages.PIVOT, perceptual=PerceptualConfig(vgg16_weights="random"), gan_loss_start_step=1
)
BATCH = 4
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
WAITS = (  # the host waits for a value, or for a length that depends on values
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


class Recorder(TorchDispatchMode):
    """Every operator's inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), out)
        )
        self.calls.append((func, inputs, outputs))
        return out

    def waits(self) -> list[str]:
        """Operators for which the host would wait: reads of values, and copies between devices."""
        return [
            str(func)
            for func, inputs, outputs in self.calls
            if func in WAITS or (func in COPIES and len({x.device.type for x in (*inputs, *outputs)}) > 1)
        ]

    def casts_of(self, weights: Iterable[Tensor]) -> list[tuple[int, ...]]:
        """Shapes of those among `weights` that were cast."""
        wanted = {id(weight) for weight in weights}
        return [
            tuple(inputs[0].shape)
            for func, inputs, _ in self.calls
            if func in COPIES and id(inputs[0]) in wanted
        ]

    def maps(self) -> list[Tensor]:
        """Feature maps of VGG16 that were made."""
        return [x for _, _, outputs in self.calls for x in outputs if is_map(x)]


class FromLists(TorchFunctionMode):
    """Counts tensors made on a device from numbers of the host: a copy from memory that is not pinned, no operator."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += func in (torch.tensor, torch.as_tensor) and out.device.type != "cpu"
        return out


def is_map(x: Tensor) -> bool:
    return (
        x.dim() == 4 and x.shape[0] == BATCH and x.shape[1] >= 64 and x.shape[2] > 1 and x.is_floating_point()
    )


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """`torch.autocast("cuda")` itself looks for a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def batch(device: str = "cpu") -> PixelBatch:
    pixels = torch.randint(
        0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    return PixelBatch(pixels.to(device), tuple(map(str, range(BATCH))), 1, ({},) * BATCH)


def take(objective: StageObjective, pixels: PixelBatch, step: int, autocast: bool = False) -> None:
    """One pack as the loop takes it: the loss, its backward pass, the discriminator's."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = objective.loss(pixels, step)
    out.loss_sum.backward()  # type: ignore[no-untyped-call]
    if objective.adversary_active(step):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            adversary = objective.adversary_loss(out.adversary_batch, step)
        adversary.loss_sum.backward()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    before = dataclasses.replace(PIVOT, perceptual=PerceptualConfig("none"), w_lpips=0.0, discriminator=None)
    build_stage(before).export(root / "pivot")
    bridge = dataclasses.replace(
        before, stage="bridge", autoencoder=None, init_from=str(root / "pivot"), bridge=BRIDGE
    )
    build_stage(bridge).export(root / "bridge")
    return {"pivot": root / "pivot", "bridge": root / "bridge"}


STAGES = ("pivot", "joint", "frozen encoder", "bridge", "decoder")


def objective_of(stage: str, exports: dict[str, Path], **changes: Any) -> StageObjective:
    config = dataclasses.replace(PIVOT, **changes)
    if stage == "joint":
        joint = dataclasses.replace(PLAIN, bridge=BRIDGE)
        config = dataclasses.replace(config, stage="joint", autoencoder=joint)
    elif stage == "frozen encoder":
        config = dataclasses.replace(config, train_encoder=False)
    elif stage == "bridge":
        start = str(exports["pivot"])
        config = dataclasses.replace(config, stage="bridge", autoencoder=None, init_from=start, bridge=BRIDGE)
    elif stage == "decoder":
        config = dataclasses.replace(
            config, stage="decoder", autoencoder=None, init_from=str(exports["bridge"])
        )
    return build_untrained(config)


@pytest.mark.parametrize("step", [0, 1], ids=["before the adversarial loss", "with it"])
@pytest.mark.parametrize("stage", STAGES)
def test_no_loss_makes_the_host_wait_for_the_device(
    stage: str, step: int, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device: tensors elsewhere than on the CPU, whose values nobody can read."""
    with torch.device("meta"):
        objective = objective_of(stage, exports)
    for module in (image_loss, objective_base):  # there are no generators of this device
        monkeypatch.setattr(module, "generator", lambda seed, purpose, device: None)
    pixels = batch("meta")
    with Recorder() as recorder, FromLists() as from_lists:
        take(objective, pixels, step)
    assert len(recorder.calls) > 100
    assert recorder.waits() == [] and from_lists.count == 0


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_are_cast_once_and_change_no_bit(
    stage: str, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU under its autocast, made to hold as on a GPU; LPIPS, which has a way of its own then, left out."""
    changes = {"perceptual": PerceptualConfig("representation", representation=VIT, depths=(0, 2))}
    found = []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(frozen, "product_dtype", lambda device, dtype=dtype: dtype)
        objective = objective_of(stage, exports, **changes)
        hashes = objective.fingerprints()
        take(objective, batch(), 1, autocast=True)
        weights = [p for module in objective.helpers for p in module.parameters()]
        weights += [p for p in objective.model.parameters() if not p.requires_grad]
        with Recorder() as recorder:
            out = objective_loss(objective)
        assert bool(recorder.casts_of(weights)) == (dtype is None), "held weights are not cast, others are"
        found.append(
            (out.loss_sum.detach(), [p.grad for p in objective.model.parameters() if p.grad is not None])
        )
        # What is exported, and compared on resume, stays fp32.
        assert {tensor.dtype for tensor in objective.model.state_dict().values()} == {torch.float32}
        assert objective.fingerprints() == hashes
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def objective_loss(objective: StageObjective) -> LossOutput:
    with torch.autocast("cpu", torch.bfloat16):
        return objective.loss(batch(), step=1)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_replica_that_holds_bf16_gives_the_features_of_one_that_is_cast(library: str) -> None:
    vit = VIT
    if library == "transformers":
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32}
        vit = RepresentationConfig(
            "tiny", 32, "random", {"model_type": "dinov2", "patch_size": 8, **sizes}, library="transformers"
        )
    replica = Representation(vit).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = replica(batch().pixels_01)
        frozen.hold(replica, torch.bfloat16)
        assert torch.equal(replica(batch().pixels_01), cast)
    dtypes = {name: p.dtype for name, p in replica.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert torch.bfloat16 in dtypes.values()


def test_networks_hold_bf16_under_cuda_autocast_alone() -> None:
    network = LpipsVgg16()
    for device in (torch.device("cpu"), CUDA):
        frozen.hold_under_autocast(network, device)
        assert next(network.parameters()).dtype == torch.float32
    with cuda_autocast():
        frozen.hold_under_autocast(network, torch.device("cpu"))
        assert next(network.vgg.parameters()).dtype == torch.float32
        frozen.hold_under_autocast(network, CUDA)
    assert {layer.weight.dtype for layer in frozen.products(network)} == {torch.bfloat16}


def test_lpips_on_a_gpu_makes_and_keeps_no_map_in_fp32() -> None:
    with torch.device("meta"):
        network = LpipsVgg16()
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast():
        network.to_empty(device=CUDA)
        frozen.hold_under_autocast(network, CUDA)
        pixels = torch.rand(BATCH, 3, 32, 32, device=CUDA, requires_grad=True)
        made, kept = forward(network, pixels)
        # Without cuDNN a fake convolution answers in the plain order; cuDNN's takes the order of its input and weight.
        first = network.vgg[0].weight
        assert isinstance(first, Tensor)
        assert in_order(first) and any(in_order(x) and x.shape[1] == 3 for x in kept if x.dim() == 4)
    assert len(made) > 50 and {x.dtype for x in made} == {torch.bfloat16}
    maps = [x for x in kept if is_map(x)]
    assert len(maps) > 13 and {x.dtype for x in maps} == {torch.bfloat16}


def test_lpips_in_bf16_keeps_maps_channels_last_and_copies_none_to_fp32_on_the_way_back() -> None:
    """On the CPU, for autograd's engine asks the driver about fake CUDA tensors."""
    network = LpipsVgg16()
    frozen.hold(network, torch.bfloat16)
    pixels = torch.rand(BATCH, 3, 32, 32, requires_grad=True)
    made, kept = forward(network, pixels)
    distance = network(pixels, network.reference(torch.rand(BATCH, 3, 32, 32)))
    with Recorder() as recorder, cuda_autocast():
        torch.autograd.grad(distance.sum(), pixels)
    assert len(recorder.maps()) > 50
    for x in (*made, *(x for x in kept if is_map(x)), *recorder.maps()):
        assert x.dtype == torch.bfloat16 and in_order(x)


def forward(network: LpipsVgg16, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Maps that a distance makes, the reference's included, and all that is kept for its gradient."""
    kept: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x)
    with keep, Recorder() as recorder:
        distance = network(pixels, network.reference(pixels))
    assert distance.dtype == torch.float32 and distance.device == pixels.device
    return recorder.maps(), kept


def in_order(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def test_lpips_in_bf16_is_lpips_to_rounding() -> None:
    """Distance and gradient against fp32, at the scale of activations that a trained VGG16 has."""
    network = LpipsVgg16()
    with torch.no_grad():
        for layer in network.vgg:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    seeded = torch.Generator().manual_seed(3)
    originals = torch.rand(BATCH, 3, 64, 64, generator=seeded)
    found = []
    for way in ("fp32", "autocast", "held"):
        if way == "held":
            frozen.hold(network, torch.bfloat16)
        pixels = (
            originals + 0.2 * torch.randn(originals.shape, generator=seeded.manual_seed(4))
        ).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            distance = network(pixels, network.reference(originals))
        found.append((distance.detach(), torch.autograd.grad(distance.sum(), pixels)[0]))
    exact, gradient = found[0]
    (_, cast_off), (error, off) = (
        (float((d / exact - 1).abs().max()), float((g - gradient).norm() / gradient.norm()))
        for d, g in found[1:]
    )
    # bf16 has 8 bits: each of 13 layers adds 0.2 % of noise to a map, thousands of cells average it in the distance.
    # The gradient is off because the noise moves some cells over a ReLU's edge; as it is with maps normalised in fp32.
    assert error < 5e-3 and off < 0.2, (error, off)
    assert off < 1.1 * cast_off, (off, cast_off)
    assert float(network(originals, network.reference(originals)).abs().max()) == 0.0


def test_lpips_in_bf16_has_a_finite_gradient_where_all_features_are_zero() -> None:
    network = LpipsVgg16()
    with torch.no_grad():
        first = network.vgg[0]
        assert isinstance(first, nn.Conv2d) and first.bias is not None
        first.bias.fill_(-1e4)
    frozen.hold(network, torch.bfloat16)
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    network(black, network.reference(torch.rand(1, 3, 32, 32))).sum().backward()
    assert black.grad is not None and bool(black.grad.isfinite().all())


class Seen(torch.autograd.Function):
    """Notes whether autocast reaches its backward pass."""

    autocast: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Seen.autocast.append(torch.is_autocast_enabled("cuda"))
        return gradient


def test_adaptive_gradients_are_taken_outside_autocast() -> None:
    """A bias's gradient is a sum: autocast would copy the whole gradient of its layer's output to fp32 for it."""
    x = nn.Parameter(torch.ones(3))
    Seen.autocast.clear()
    with cuda_autocast():
        adaptive.gradient(Seen.apply(x).sum(), x)
        adaptive.pull_back(Seen.apply(x), torch.ones(3), x)
        adaptive.back_once(Seen.apply(x), torch.ones(3), x, [])
    assert Seen.autocast == [False] * 3
