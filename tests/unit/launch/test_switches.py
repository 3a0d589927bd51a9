"""Every key that a shipped config sets away from its default changes what is trained, or the batch it is trained on.

For each key of `stage`, `flow`, `generator`, `packing` and `pixels` two tiny runs are built, which differ in that key
alone: one has the shipped value, the other the default (or the tiny run's value, if there is no default). Names and
shapes of weights, losses and gradients of some steps, or the batch must differ. Keys without such an effect are listed
with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from base.config import ConfigError, UserError
from data.config import ClassPackingConfig, PackingConfig, PixelConfig
from data.packs.class_batch import ClassBatch, ClassPacker
from data.packs.packed_batch import TextSplit
from data.packs.packing import EditPacker, T2IPacker
from data.samples.images import PixelPacker
from data.shards import LatentInfo, Sample
from generator.class_conditional.config import ClassFlowConfig, DitConfig, WideHeadConfig
from generator.class_conditional.model import new_generator
from generator.class_conditional.objective import build_class_objective
from generator.config import DdtHeadConfig, FlowConfig, GeneratorConfig
from generator.model import Generator
from generator.objective import build_objective
from helpers.generators import BACKBONE
from helpers.packs import Splits, image, pack
from helpers.stages import BRIDGE, PIVOT, PLAIN, VIT, pixel_batch
from helpers.texts import Letters
from helpers.weights import shake
from launch.runs.configs import Run, TokenizerRun
from launch.runs.tasks import read_run
from tokenizer.config import PixelDecoderConfig, RepresentationConfig, without_weights
from tokenizer.representation import Representation
from tokenizer.training.build_stage import build_untrained
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig, StageConfig

CONFIGS = Path(__file__).parents[3] / "configs"
PARTS = {
    "generator/parts": "generator/t2i_cc12m.yaml",
    "generator/class/parts": "generator/class/rpiae64_80.yaml",
    "tokenizer/parts": "tokenizer/pivot.yaml",
}
SECTIONS = ("stage", "flow", "generator", "packing", "pixels")
NEVER = 1 << 20
"""A step that no test reaches."""

ANY = object()
"""Every value of a key."""
PATH = "a folder of weights: test_tokenizer_stages.py and test_generator_objective.py start from some"
INHERITED = "inherited from pivot.yaml: keys of other stages' losses have no effect (StageConfig)"
TAU = "the number that the default, None, stands for in this stage"
QWEN = "a checkpoint: test_generator_parity.py compares with it"
WITHOUT_EFFECT: list[tuple[str, str, Any, str]] = [
    ("pivot joint bridge decoder", "stage.stage", ANY, "names the objective whose keys are looked at"),
    ("pivot joint", "stage.autoencoder", ANY, "exactly one of autoencoder and init_from is given"),
    ("pivot joint", "stage.autoencoder.image_px", ANY, "refused unless it is the token grid times patch_px"),
    ("bridge decoder", "stage.init_from", ANY, PATH),
    ("pivot joint", "stage.noise_tau", 0.8, TAU),
    ("bridge", "stage.noise_tau", 0.0, TAU),
    ("decoder", "stage.w_pivot", ANY, INHERITED),
    ("decoder", "stage.adaptive_pivot_start_step", ANY, INHERITED),
    ("decoder", "stage.noise_law", ANY, INHERITED),
    ("edit", "flow.init_from", ANY, PATH),
    ("t2i edit class", "flow.compile", ANY, "the numbers stay: test_whole_layers.py"),
    ("t2i edit", "generator.init", "qwen:Qwen/Qwen2.5-0.5B", QWEN),
]
"""(stages or tasks, key, value, reason)"""


@functools.cache
def runs() -> tuple[Run, ...]:
    """Every run that a file of configs/ names, and each part upon a run that it is made for."""
    found = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        folder = str(path.parent.relative_to(CONFIGS))
        if folder in PARTS:
            found.append(read_run([str(CONFIGS / PARTS[folder]), str(path)]))
        else:
            with contextlib.suppress(UserError):  # a config of another command has no task
                found.append(read_run(str(path)))
    return tuple(found)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """MISSING: the field must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def settings_of(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, default) of every key below a section. A representation model is one value."""
    for field in dataclasses.fields(section):
        key, value, default = f"{prefix}.{field.name}", getattr(section, field.name), default_of(field)
        is_section = dataclasses.is_dataclass(value) and not isinstance(value, RepresentationConfig)
        if not is_section or default is None:
            yield key, value, default
        if is_section:
            yield from settings_of(value, key)


@functools.cache
def switches() -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """(stage or task, key) -> distinct (value, default) of the shipped configs, without values that are the default."""
    found: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    for run in runs():
        kind = run.stage.stage if isinstance(run, TokenizerRun) else run.task
        for section in SECTIONS:
            if not hasattr(run, section):
                continue
            for key, value, default in settings_of(getattr(run, section), section):
                pairs = found.setdefault((kind, key), [])
                if value != default and (value, default) not in pairs:
                    pairs.append((value, default))
    return {switch: pairs for switch, pairs in found.items() if pairs}


Look = Callable[[Any], dict[str, Any]]
"""A section's config -> what it makes, by name."""


def shapes(*modules: nn.Module | None) -> dict[str, Any]:
    return {
        f"{index}.{name}": (tuple(tensor.shape), tensor.requires_grad)
        for index, module in enumerate(modules)
        if module is not None
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def learned(model: nn.Module, loss: Tensor) -> dict[str, Any]:
    """The loss and its gradients."""
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients}


DECODER = PixelDecoderConfig(
    96, 2, 4, 128, 8, "vit", 32, (1, 1, 2, 2), 1
)  # as a ViT and as a CNN, eight-fold
SMALL = dataclasses.replace(PLAIN, decoder=DECODER)
WHOLE = dataclasses.replace(SMALL, bridge=BRIDGE)
FIRST = dataclasses.replace(
    PIVOT,
    autoencoder=SMALL,
    perceptual=PerceptualConfig("representation", representation=VIT, depths=(0, 1)),
    discriminator=DiscriminatorConfig(VIT, depths=(0,)),
)
STAGES = {
    "pivot": FIRST,
    "joint": dataclasses.replace(FIRST, stage="joint", autoencoder=WHOLE),
    "bridge": dataclasses.replace(FIRST, stage="bridge", autoencoder=None, init_from="none", bridge=BRIDGE),
    "decoder": dataclasses.replace(FIRST, stage="decoder", autoencoder=None, init_from="none"),
}
STARTS = {"bridge": SMALL, "decoder": WHOLE}


def stage_shapes(keeps_discriminator: bool, config: StageConfig) -> dict[str, Any]:
    """Without the discriminator, whose many small operations take most of the time, unless it is looked at."""
    if not keeps_discriminator:
        config = dataclasses.replace(config, discriminator=None)
    with torch.device("meta"):
        objective = build_untrained(config, starts_from=STARTS.get(config.stage))
    return shapes(objective.model, objective.adversary, *objective.helpers)


def stage_step(step: int, config: StageConfig) -> dict[str, Any]:
    objective = build_untrained(config, starts_from=STARTS.get(config.stage))
    shake(objective.model, 1, 0.02)
    output = objective.loss(pixel_batch(), step)
    found = learned(objective.model, output.loss_sum)
    return {**found, **output.metrics, "updates": objective.adversary_active(step)}


LATENTS = LatentInfo("fp32", (4, 3, 3), (0.5,) * 4, (2.0,) * 4, "autoencoder", "text")
GENERATOR: dict[str, Any] = {
    "generator": GeneratorConfig(dataclasses.replace(BACKBONE, num_kv_heads=1), max_side=4),
    "flow": FlowConfig(),
    "packing": PackingConfig(100_000, max_side=4),
}
CLASSES: dict[str, Any] = {
    # 192: a multiple of 4 times every shipped number of heads
    "generator": DitConfig(num_classes=5, width=192, num_layers=1, num_heads=2),
    "flow": ClassFlowConfig(),
    "packing": ClassPackingConfig(4),
}
HEADS = {"class": WideHeadConfig(64, 1, 4), "t2i": DdtHeadConfig(64, 1, 4), "edit": DdtHeadConfig(64, 1, 4)}


def generator_shapes(config: GeneratorConfig) -> dict[str, Any]:
    with torch.device("meta"):
        return shapes(Generator(config, LATENTS))


def class_shapes(config: DitConfig) -> dict[str, Any]:
    with torch.device("meta"):
        return shapes(new_generator(config, LATENTS))


def generator_step(section: str, config: Any) -> dict[str, Any]:
    sections = GENERATOR | {section: config}
    objective = build_objective("t2i", sections["generator"], sections["flow"], LATENTS, Letters(), seed=0)
    shake(objective.model, 1, 0.05)
    splits: list[Splits] = [[TextSplit([1, 5, 2]), image(0, noisy=True)], [image(1, noisy=False)]]
    return learned(objective.model, objective.loss(pack(splits), 0).loss_sum)


def class_step(section: str, config: Any) -> dict[str, Any]:
    sections = CLASSES | {section: config}
    objective = build_class_objective(sections["generator"], sections["flow"], LATENTS, seed=0)
    shake(objective.model, 1, 0.05)
    latents = torch.randn((2, *LATENTS.shape), generator=torch.Generator().manual_seed(0))
    batch = ClassBatch(latents, torch.tensor([1, 3]), ("a", "b"), 7)
    return learned(objective.model, objective.loss(batch, 0).loss_sum)


def latent_batch(kind: str, config: Any) -> dict[str, Any]:
    """20 samples with captions of four kinds, of which every fourth lacks LLaVA's, and a label."""
    roles = ("source.latent", "target.latent") if kind == "edit" else ("latent",)
    samples = []
    for number in range(20):
        captions = {"llava": "long", "llava_short": "short", "alt": "alt", "other": "never"}
        if number % 4 == 0:
            del captions["llava"]
        tree = json.dumps({"captions": captions, "instructions": captions, "label": 3}).encode()
        values = np.full(LATENTS.shape, number, "<f4").tobytes()
        samples.append(Sample(f"s{number}", {**dict.fromkeys(roles, values), "json": tree}))
    if kind == "class":
        return packed(ClassPacker(config, LATENTS, num_classes=5), samples)
    return packed((EditPacker if kind == "edit" else T2IPacker)(config, LATENTS, Letters()), samples)


def pixel_pack(config: PixelConfig) -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return packed(PixelPacker(config), [Sample("a", {"png": buffer.getvalue()})])


def packed(packer: Any, samples: list[Sample]) -> dict[str, Any]:
    """How much a pack holds, and the tensors of one."""
    batch = packer.collate(samples, step=0, stream=0, epochs=[0] * len(samples), seed=0)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return {"budget": packer.budget, **tensors}


def tiny(kind: str, key: str, values: tuple[Any, Any]) -> tuple[Any, list[Look]]:
    """The tiny section in which `key` is changed, and the looks at it, the cheapest first."""
    section = key.partition(".")[0]
    if section == "pixels":
        return PixelConfig(2, 32, resize_px=None if key == "pixels.image_px" else 40), [pixel_pack]
    if section == "stage":
        steps = {0, *(value for value in values if type(value) is int)}
        steps |= {step - 1 for step in steps if step}
        base = STAGES[kind]
        if key == "stage.gan_update_start_step":
            base = dataclasses.replace(base, gan_loss_start_step=NEVER)
        if key == "stage.noise_law":
            base = dataclasses.replace(base, noise_tau=0.3)
        at_steps: list[Look] = [functools.partial(stage_step, step) for step in sorted(steps)]
        if key.count(".") == 1 and not dataclasses.is_dataclass(values[0]):  # a number: shapes stay
            return base, at_steps
        return base, [functools.partial(stage_shapes, "discriminator" in key), *at_steps]
    is_class = kind == "class"
    base = (CLASSES if is_class else GENERATOR)[section]
    if section == "packing":
        return base, [functools.partial(latent_batch, kind)]
    if key.startswith("generator.head."):
        base = dataclasses.replace(base, head=HEADS[kind])
    step = functools.partial(class_step if is_class else generator_step, section)
    return base, [*([class_shapes if is_class else generator_shapes] if section == "generator" else []), step]


def changed(section: Any, names: list[str], value: Any) -> Any:
    """A copy of a section with another value of the field that `names` lead to."""
    first, *rest = names
    if first == "autoencoder" and rest == ["representation"]:  # the image follows the token grid
        with torch.device("meta"):
            side = Representation(without_weights(value)).grid[0]
        autoencoder = dataclasses.replace(
            section.autoencoder, representation=value, image_px=side * section.autoencoder.decoder.patch_px
        )
        return dataclasses.replace(section, autoencoder=autoencoder)
    if rest:
        value = changed(getattr(section, first), rest, value)
    return dataclasses.replace(section, **{first: value})


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def is_excepted(kind: str, key: str, value: Any) -> bool:
    return any(
        kind in kinds.split() and key == name and (of is ANY or of == value)
        for kinds, name, of, _ in WITHOUT_EFFECT
    )


@pytest.mark.parametrize(("kind", "key"), switches(), ids=[" ".join(switch) for switch in switches()])
def test_a_key_that_a_config_sets_changes_what_is_trained(kind: str, key: str) -> None:
    names = key.split(".")[1:]
    num_compared = 0
    for value, default in switches()[kind, key]:
        if is_excepted(kind, key, value):
            num_compared += 1
            continue
        base, looks = tiny(kind, key, (value, default))
        other = functools.reduce(getattr, names, base) if default is dataclasses.MISSING else default
        if value == other:
            continue
        num_compared += 1
        assert any(changes(look, base, names, value, other) for look in looks), (
            f"{kind}: {key} {value!r} trains what {other!r} trains"
        )
    assert num_compared, "no value is compared: give the tiny run another one than the configs"


def changes(look: Look, base: Any, names: list[str], value: Any, other: Any) -> bool:
    """Whether a look differs. Where `other` is refused, the tiny run's own value takes its place."""
    found = seen(look, changed(base, names, value))
    try:
        expected = seen(look, changed(base, names, other))
    except ConfigError:
        expected = seen(look, base)
    return found.keys() != expected.keys() or not all(is_equal(found[name], expected[name]) for name in found)


SEEN: dict[tuple[str, str], dict[str, Any]] = {}
"""What a look at a section showed: many keys are compared with the same tiny run."""


def seen(look: Look, section: Any) -> dict[str, Any]:
    names = repr(look), repr(section)
    if names not in SEEN:
        SEEN[names] = look(section)
    return SEEN[names]


def test_every_exception_is_a_value_of_a_shipped_config() -> None:
    for kinds, key, value, _ in WITHOUT_EFFECT:
        for kind in kinds.split():
            assert value is ANY or value in [shipped for shipped, _ in switches()[kind, key]]
            assert (kind, key) in switches()
