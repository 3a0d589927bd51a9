"""Rows of the table of identities: weights, autoencoders, latent shards, generators and what images are drawn with."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from base import files
from data.shards import LatentInfo
from generator import draw_on_ranks, prompt_set
from generator.class_conditional import class_set
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig, DitConfig
from generator.class_conditional.model import create_generator
from generator.class_conditional.objective import build_class_objective
from generator.config import FlowConfig, GeneratorConfig
from generator.model import Generator
from generator.objective import build_objective
from generator.prompts import Prompt
from generator.sampling_config import SamplingConfig
from helpers.data_identities import encoded, shards, write_files
from helpers.generators import BACKBONE
from helpers.identities import Identity, fields_identity
from helpers.stages import PIVOT, PLAIN, VIT
from helpers.weights import shake
from tokenizer.config import EncodeConfig
from tokenizer.encode import _Job
from tokenizer.export import fingerprint
from tokenizer.rpiae import Autoencoder
from tokenizer.training.build_stage import build_untrained
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.image_loss import ImageLoss
from tokenizer.weights import state_hash

PIXELS = {"a": encoded(1, 32)}


class Module(nn.Module):
    """Two parameters and a buffer, in either order."""

    def __init__(
        self, name: str, dtype: torch.dtype, shape: Any, value: float, buffer: float, first: bool
    ) -> None:
        super().__init__()
        adds = [
            lambda: self.register_parameter(name, nn.Parameter(torch.full(shape, value, dtype=dtype))),
            lambda: self.register_parameter("a", nn.Parameter(torch.zeros(2))),
            lambda: self.register_buffer("z", torch.tensor([0.0, buffer])),
        ]
        for add in adds if first else reversed(adds):
            add()


@functools.cache
def small() -> Autoencoder:
    return Autoencoder(PLAIN)


def autoencoder(folder: Path, weight: float) -> Path:
    """An exported autoencoder whose weights are all `weight`."""
    with torch.no_grad():
        for parameter in small().parameters():
            parameter.fill_(weight)
    small().save(folder)
    return folder


def exported(folder: Path, weight: float, image: Any, provenance: str, start: str) -> str:
    autoencoder(folder, weight)
    tree = files.read_json(folder / "config.json")
    tree[Autoencoder.kind] |= image
    tree[Autoencoder.kind]["representation"]["weights"] = start
    files.write_json(folder / "config.json", {**tree, "provenance": {"note": provenance}})
    return fingerprint(folder)


def encoded_as(folder: Path, weight: float, pixels: dict[str, bytes], text: str | None, **config: Any) -> str:
    """The identity of latent shards."""
    made, source = autoencoder(folder / "autoencoder", weight), shards(folder / "pixels", pixels)
    asked = EncodeConfig(str(made), str(source), str(folder / "out"), text, **config)
    known: Any = SimpleNamespace(fingerprint=text)
    model: Any = SimpleNamespace(config=PLAIN, has_logvar=True)
    model.to = lambda device: model
    with (
        mock.patch("tokenizer.encode.load_text_tokenizer", lambda name: known),
        mock.patch("tokenizer.encode.load_autoencoder", lambda name: model),
    ):
        return _Job(asked).source


ENCODED: dict[str, Any] = {
    "weight": 0.0,
    "pixels": PIXELS,
    "text": "words",
    "resize_px": 32,
    "num_crops": 2,
    "horizontal_flip": False,
    "seed": 0,
    "logvar": False,
    "batch_images": 4,
    "dtype": "fp32",
    "num_decode_threads": 1,
}


def stage(folder: Path, seed: int, perceptual: Any, discriminator: Any, learning: float) -> dict[str, str]:
    config = dataclasses.replace(
        PIVOT,
        seed=seed,
        perceptual=dataclasses.replace(PIVOT.perceptual, representation=perceptual),
        discriminator=discriminator and DiscriminatorConfig(discriminator, depths=(0, 2)),
        w_lpips=learning,
    )
    return dict(build_untrained(config).fingerprints())


def frozen_networks(folder: Path, perceptual: float | None, features: float | None) -> object:
    networks = [value and nn.Conv2d(1, 1, 1).requires_grad_(False) for value in (perceptual, features)]
    for network, value in zip(networks, (perceptual, features), strict=True):
        if network:
            nn.init.constant_(network.weight, value)
            nn.init.constant_(network.bias, value)
    given: Any = SimpleNamespace(perceptual=networks[0], features=networks[1])
    return ImageLoss.fingerprints(given)


NARROW = dataclasses.replace(VIT, overrides={**VIT.overrides, "embed_dim": 24})
LATENTS = LatentInfo("fp32", (4, 2, 3), (1.0,) * 4, (2.0,) * 4, "autoencoder", "text")
GENERATOR = GeneratorConfig(BACKBONE, max_side=4)
DIT = DitConfig(num_classes=5, width=32, num_layers=2, num_heads=4)


def flow(
    folder: Path, generator: GeneratorConfig, seed: int, tokenizer: str, text: str, start: Any, shift: Any
) -> object:
    """`start`: the seed of exported weights to start from."""
    latents = dataclasses.replace(LATENTS, tokenizer_fingerprint=tokenizer, text_tokenizer_fingerprint=text)
    if start is not None:
        Generator.create(generator, latents, start).save(folder)
    config = FlowConfig(init_from=None if start is None else str(folder), time_shift=shift)
    words: Any = SimpleNamespace(fingerprint=text, vocab_size=30)
    return dict(build_objective("t2i", generator, config, latents, words, seed=seed).fingerprints())


def class_flow(folder: Path, generator: DitConfig, seed: int, tokenizer: str, start: int | None) -> object:
    latents = dataclasses.replace(LATENTS, tokenizer_fingerprint=tokenizer)
    if start is not None:
        model = create_generator(generator, latents, start)
        shake(model, start, 0.1)
        model.save(folder)
    config = ClassFlowConfig(init_from=None if start is None else str(folder))
    return dict(build_class_objective(generator, config, latents, seed=seed).fingerprints())


def drawn(
    folder: Path, prompts: str, sources: dict[str, bytes], number: int, sampling: Any, made_by: Any
) -> object:
    """What images of prompts are drawn with."""
    write_files(folder, {**sources, "p.jsonl": prompts.encode()})
    team: Any = SimpleNamespace(rank=0, world=1)
    with mock.patch.object(prompt_set, "draw_on_ranks") as draw:
        prompt_set.draw_prompts(
            lambda: None,  # type: ignore[arg-type,return-value]
            folder / "p.jsonl",
            folder,
            SamplingConfig(**sampling),
            number,
            drawn_with=made_by,
            team=team,
        )
    return draw.call_args.kwargs["drawn_with"]


def drawn_classes(folder: Path, sampling: Any, made_by: Any) -> object:
    pipeline: Any = SimpleNamespace(generator=SimpleNamespace(config=SimpleNamespace(num_classes=3)))
    team: Any = SimpleNamespace(rank=0, world=1)
    with mock.patch.object(class_set, "draw_on_ranks") as draw:
        class_set.draw_classes(
            pipeline, folder, ClassSamplingConfig(**sampling), 2, drawn_with=made_by, team=team
        )
    return draw.call_args.kwargs["drawn_with"]


EDITS = '{"image": "a.png", "instruction": "red"}\n{"image": "b.png", "instruction": "blue"}'
SOURCES = {"a.png": b"1", "b.png": b"2"}
DRAWING = {"num_steps": 9, "solver": "heun", "time_shift": 2.0, "seed": 5}
GUIDANCE = {
    "text_guidance": 5.0,
    "source_guidance": 3.0,
    "guidance_interval": (0.1, 0.9),
    "renorm": "global",
    "renorm_min": 0.5,
}
MODELS: tuple[Identity, ...] = (
    Identity(
        "tokenizer.weights.state_hash",
        lambda folder, second, **module: state_hash(Module(**module), Module(**{**module, "value": second})),
        {"name": "w", "dtype": torch.float32, "shape": (2, 3), "value": 1.0, "buffer": 1.0, "first": True}
        | {"second": 2.0},
        {"name": "v", "dtype": torch.float64, "shape": (3, 2), "value": 1.5, "buffer": 2.0, "second": 3.0},
        {"the order in the module": {"first": False}},
    ),
    Identity(
        "tokenizer.export.fingerprint",
        exported,
        {"weight": 0.0, "image": {}, "provenance": "one run", "start": "random"},
        {"weight": 1.0, "image": {"image_px": 64}},
        {"its provenance": {"provenance": "another run"}, "the encoder's first weights": {"start": "hub"}},
    ),
    Identity(
        "tokenizer.encode._Job.source",
        encoded_as,
        ENCODED,
        {
            "weight": 1.0,
            "pixels": {"b": PIXELS["a"]},
            "text": "letters",
            "resize_px": 48,
            "num_crops": 3,
            "horizontal_flip": True,
            "seed": 1,
            "logvar": True,
            "batch_images": 8,
            "dtype": "bf16",
        },
        {"the number of threads": {"num_decode_threads": 2}},
        through=["tokenizer.encode._Job.__init__"],
    ),
    Identity(
        "tokenizer.training.objective_base.StageObjective.fingerprints",
        stage,
        {"seed": 0, "perceptual": VIT, "discriminator": VIT, "learning": 1.0},
        {"seed": 1, "perceptual": NARROW, "discriminator": NARROW},
        {"a weight of the loss": {"learning": 2.0}},
        through=["tokenizer.training.objective_base.StageObjective.__init__"],
    ),
    Identity(
        "tokenizer.training.objective_base.StageObjective.fingerprints",
        lambda folder, seed: stage(folder, seed, VIT, None, 1.0)["initial_weights"],
        {"seed": 0},
        {"seed": 1},
    ),
    Identity(
        "tokenizer.training.image_loss.ImageLoss.fingerprints",
        frozen_networks,
        {"perceptual": 1.0, "features": 2.0},
        {"perceptual": 3.0, "features": None},
    ),
    Identity(
        "generator.objective.FlowObjective.fingerprints",
        flow,
        {"generator": GENERATOR, "seed": 0, "tokenizer": "a", "text": "text", "start": None, "shift": 1.0},
        {"generator": dataclasses.replace(GENERATOR, max_side=8), "seed": 1, "tokenizer": "b", "start": 1}
        | {"text": "other"},
        {"how it is trained": {"shift": 2.0}},
        through=["generator.objective.build_objective"],
    ),
    Identity(
        "generator.objective.FlowObjective.fingerprints",
        flow,
        {"generator": GENERATOR, "seed": 0, "tokenizer": "a", "text": "text", "start": 1, "shift": 1.0},
        {"tokenizer": "b", "start": 2},
        {"the seed, which draws no weights": {"seed": 1}},
    ),
    Identity(
        "generator.class_conditional.objective.ClassObjective.fingerprints",
        class_flow,
        {"generator": DIT, "seed": 0, "tokenizer": "a", "start": None},
        {"generator": dataclasses.replace(DIT, num_layers=3), "seed": 1, "tokenizer": "b", "start": 1},
        through=["generator.class_conditional.objective.build_class_objective"],
    ),
    Identity(
        "generator.class_conditional.objective.ClassObjective.fingerprints",
        class_flow,
        {"generator": DIT, "seed": 0, "tokenizer": "a", "start": 1},
        {"tokenizer": "b", "start": 2},
        {"the seed, which draws no weights": {"seed": 1}},
    ),
    Identity(
        "generator.draw_on_ranks.export_digest",
        lambda folder, config, weights, note: draw_on_ranks.export_digest(
            write_files(folder, {"config.json": config, "model.safetensors": weights, "note": note})
        ),
        {"config": b"a", "weights": b"b", "note": b""},
        {"config": b"b", "weights": b"a"},
        {"other files": {"note": b"x"}},
    ),
    fields_identity(
        "generator.draw_on_ranks.sampling_settings",
        SamplingConfig(),
        draw_on_ranks.sampling_settings,
        {**DRAWING, **GUIDANCE},
        {"batch_images": 3},
    ),
    Identity(
        "generator.prompts.Prompt.image_seed",
        lambda folder, key, text, number, seed: Prompt(key, text, (), None, {}).image_seed(number, seed),
        {"key": "a", "text": "red", "number": 0, "seed": 0},
        {"key": "b", "number": 1, "seed": 2},
        {"the text": {"text": "blue"}},
    ),
    Identity(
        "generator.prompts.Prompt.image_seed",
        lambda folder, key, own, number, seed: Prompt(key, "red", (), own, {}).image_seed(number, seed),
        {"key": "a", "own": 7, "number": 0, "seed": 0},
        {"own": 9, "number": 1},
        {"the run's seed": {"seed": 1}, "the key": {"key": "b"}},
    ),
    Identity(
        "generator.class_conditional.class_set._image_seed",
        lambda folder, **names: class_set._image_seed(**names),
        {"seed": 0, "label": 1, "number": 2},
        {"seed": 1, "label": 2, "number": 1},
    ),
    Identity(
        "generator.prompt_set._sources_digest",
        lambda folder, sources: prompt_set._sources_digest(
            [Prompt("k", "red", tuple(write_files(folder, sources) / name for name in sources), None, {})]
        ),
        {"sources": SOURCES},
        {"sources": dict(reversed(SOURCES.items()))},
        {"the files' names": {"sources": {"c.png": b"1", "d.png": b"2"}}},
    ),
    Identity(
        "generator.prompt_set.draw_prompts",
        drawn,
        {"prompts": EDITS, "sources": SOURCES, "number": 1, "sampling": {}, "made_by": {"generator": "a"}},
        {
            "prompts": EDITS.replace("red", "green"),
            "sources": {"a.png": b"1", "b.png": b"3"},
            "number": 2,
            "sampling": {"text_guidance": 5.0},
            "made_by": {"generator": "b"},
        },
        {"the batch": {"sampling": {"batch_images": 3}}},
    ),
    Identity(
        "generator.class_conditional.class_set.draw_classes",
        drawn_classes,
        {"sampling": {}, "made_by": {"generator": "a"}},
        {"sampling": {"seed": 1}, "made_by": {"generator": "b"}},
        {"the batch": {"sampling": {"batch_images": 3}}},
    ),
)
