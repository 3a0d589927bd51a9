"""Rows of the table of identities: image sources, judges, features, stored answers and the suites' fingerprints."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from data.config import PixelConfig
from data.image_set import ImageSet, Item
from data.shards import ShardDataset
from evaluation import benchmark_files, stage_set
from evaluation.features.feature_files import FeatureFiles
from evaluation.features.inception import AdmInception, InceptionFeatures
from evaluation.features.representation import RepresentationFeatures
from evaluation.features.vision_transformers import VisionFeatures
from evaluation.image_source import FileImages, ImagePairs, LooseImages, NpzImages, RoleImages
from evaluation.judges.colour import ClipColours
from evaluation.judges.detector import NAMES, Mask2FormerDetector
from evaluation.judges.endpoint import EndpointJudge
from evaluation.judges.interface import Asked, Decoding, question
from evaluation.judges.vision_language import TransformersJudge
from evaluation.linear_head import CROP_PX, HeadClassifier
from evaluation.metrics.probe import LinearProbe
from evaluation.metrics.reconstruction import Lpips
from evaluation.reference import Reference
from evaluation.store import Question, config_hash
from evaluation.suites import generation
from evaluation.suites.dpg import DpgSuite
from evaluation.suites.edit_benchmarks import GEditSuite, ImgEditSuite
from evaluation.suites.geneval import GenEvalSuite
from evaluation.suites.linear_probe import LinearProbeSuite, _RankedClasses
from evaluation.suites.reconstruction import PairScores, ReconstructionSuite
from helpers.data_identities import encoded, shards, write_files
from helpers.identities import Identity

PICTURES = {"1.png": encoded(1), "2.png": encoded(2)}
OTHERS = {"1.png": encoded(1), "2.png": encoded(3)}
SWAPPED = {"1.png": encoded(2), "2.png": encoded(1)}
ASKED = Asked("sc", ("source", "result"), "is it red?", 1, 0, like="result")
ROLES = {"source": encoded(1), "result": encoded(2)}


class Numbers(nn.Module):
    """A network whose one weight is `value`; a transformers model, as far as the constructors look at it."""

    def __init__(self, value: float, config: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("buffer", torch.tensor([1.0]))
        self.config, self.dtype = config, torch.float32

    def forward(self, pixels: Any = None, **_: Any) -> Any:
        return torch.zeros(1, 4)


def judged(
    folder: Path, asked: Asked, judge: str, item: str, pictures: dict[str, bytes], names: str = ""
) -> object:
    """The store's key of a question; `names`: the start of the files' names."""
    write_files(folder, {f"{names}{role}.png": payload for role, payload in pictures.items()})
    one = Item(item, {role: f"{names}{role}.png" for role in pictures}, {})
    asks: Any = SimpleNamespace(fingerprint=judge)
    return question(asks, ImageSet(folder, (one,)), one, asked).key


def judge(
    folder: Path, weight: float, template: str, max_px: int, name: str, source: str, **decoding: Any
) -> str:
    pictures = SimpleNamespace(to_json_string=lambda: json.dumps({"max_pixels": max_px}))
    processor = SimpleNamespace(chat_template=template, image_processor=pictures)
    return TransformersJudge(
        name, Numbers(weight), processor, Decoding(**decoding), source=source
    ).fingerprint


def in_folder(folder: Path, content: dict[str, bytes]) -> FileImages:
    write_files(folder, content)
    return FileImages([folder / name for name in content])


def npz(folder: Path, level: int, name: str = "a.npz", mean: float = 0.0) -> Path:
    images = np.full((2, 2, 2, 3), level, np.uint8)
    statistics = {"mu": np.full(2, mean), "sigma": np.eye(2)}
    np.savez(folder / name, arr_0=images, **statistics)
    return folder / name


def statistics(folder: Path, mean: float, deviation: float, name: str = "a.npz") -> str:
    np.savez(folder / name, mu=np.full(2, mean), sigma=deviation * np.eye(2))
    return Reference.open(folder / name).digest


def named(fingerprint: str, **more: Any) -> Any:
    """Anything that is known by its fingerprint."""
    return SimpleNamespace(
        fingerprint=fingerprint, fingerprints={"one": fingerprint}, name="x", protocol={}, dim=2, **more
    )


def rows(folder: Path, function: str, pictures: dict[str, bytes], dim: int, kind: str) -> str:
    with mock.patch.object(FeatureFiles, "KIND", kind):
        given = named(function)
        given.dim = dim
        return FeatureFiles(folder / "store", given, in_folder(folder, pictures))._directory.name


def clip(folder: Path, weight: float, source: str, sentences: tuple[str, ...]) -> str:
    part = SimpleNamespace(hidden_act="quick_gelu", image_size=8)
    model = Numbers(weight, SimpleNamespace(text_config=part, vision_config=part))
    with mock.patch("evaluation.judges.colour.TEMPLATES", sentences):
        return ClipColours(model, None, source=source).fingerprint


def vision(folder: Path, kind: Any, weight: float, input_px: int, source: str = "given") -> str:
    with mock.patch.object(VisionFeatures, "__call__", lambda self, pixels: torch.zeros(1, 4)):
        return VisionFeatures(kind, Numbers(weight), input_px, source=source).fingerprint


class Encoder(Numbers):
    """A representation of another name with the same weights."""

    def __init__(self, weight: float, input_px: int, mean: float, std: float, name: str = "vit") -> None:
        super().__init__(weight, SimpleNamespace(input_px=input_px, name=name))
        self.mean, self.std, self.width = (mean,) * 3, (std,) * 3, 4


def encoder_features(folder: Path, pooling: Any, run: str = "run", **encoder: Any) -> str:
    network: Any = Encoder(**encoder)
    return RepresentationFeatures(run, network, pooling).fingerprint


def adm(folder: Path, weight: float, head: float) -> str:
    network = Numbers(weight)
    with mock.patch.object(AdmInception, "__call__", lambda self, pixels: torch.zeros(1, 4)):
        return AdmInception(network, nn.Identity(), torch.full((2, 3), head)).fingerprint


def probe(folder: Path, **values: Any) -> str:
    l2 = values.pop("l2")
    return LinearProbe(**{name: torch.tensor(value) for name, value in values.items()}, l2=l2).fingerprint


def head_classifier(folder: Path, encoder: float, head: float) -> object:
    network: Any = Encoder(encoder, CROP_PX, 0.5, 0.5)
    layer: Any = Numbers(head)
    layer.norm_weight = layer.bias = torch.zeros(4)
    return dict(HeadClassifier(network, layer).fingerprints)


def generated(folder: Path, reference: str, features: dict[str, str]) -> object:
    extractors = {name: named(fingerprint) for name, fingerprint in features.items()}
    spaces: Any = SimpleNamespace(extractors=lambda: extractors, inception=None)
    given: Any = SimpleNamespace(name="r", digest=reference, images=object(), pool=None)
    return dict(generation.GenerationSuite(given, spaces, folder).fingerprints)


def edited(kind: Any) -> Any:
    def make(folder: Path, judge: str, instructions: str) -> object:
        given: Any = SimpleNamespace(sha256=instructions)
        return dict(kind(given, named(judge), folder).fingerprints)

    return make


def dpg(folder: Path, judge: str, questions: bytes) -> object:
    write_files(folder, {"graphs.csv": questions})
    with mock.patch("evaluation.suites.dpg.read_graphs", lambda *_: {}):
        return dict(DpgSuite(folder / "graphs.csv", named(judge), folder).fingerprints)


TAG = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}


def geneval(folder: Path, detector: str, colours: str, picture: bytes, meta: Any, item: str) -> object:
    write_files(folder, {"r.png": picture})
    one = Item(item, {"result": "r.png"}, meta)
    suite = GenEvalSuite(named(detector), named(colours), folder)
    return suite._question(ImageSet(folder, (one,)), one).key, dict(suite.fingerprints)


def classes(folder: Path, fingerprints: dict[str, str], protocol: dict[str, str]) -> object:
    given: Any = SimpleNamespace(fingerprints=fingerprints, protocol=protocol, num_classes=9)
    return _RankedClasses(given).fingerprint


def reconstruction(folder: Path, lpips: str | None, features: str) -> object:
    suite = ReconstructionSuite(folder, lpips and named(lpips), {"rfid": named(features)})
    return dict(suite.fingerprints)


def role_images(folder: Path, size: int, time_s: int) -> bool:
    """Whether a suite that has read a file of 2 bytes and time 0 keeps what it knows of it."""
    item = Item("1", {"result": "1.png"}, {})
    images, role = ImageSet(folder, (item,)), RoleImages("result")
    found = []
    for num_bytes, at_s in ((2, 0), (size, time_s)):
        write_files(folder, {"1.png": b"x" * num_bytes})
        os.utime(folder / "1.png", (at_s, at_s))
        found.append(role.of(images, [item]))
    return found[0] is found[1]


def stage_images(folder: Path, payloads: dict[str, bytes], image_px: int, drawn_with: Any) -> object:
    dataset = ShardDataset.open(shards(folder, payloads))
    with mock.patch.object(stage_set, "draw_on_ranks") as draw:
        stage_set.reconstruct_samples(
            Numbers(1.0),
            dataset,
            PixelConfig(2, image_px),
            folder,
            2,
            drawn_with=drawn_with,
            team=object(),  # type: ignore[arg-type]
        )
    return draw.call_args.kwargs["drawn_with"]


DECODED = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "max_new_tokens": 5}
HASHED = {"mean": [0.0], "std": [1.0], "weight": [[1.0]], "bias": [0.0], "l2": 1e-3}
ENCODER = {"weight": 1.0, "input_px": 8, "mean": 0.5, "std": 0.5, "pooling": "mean_patch"}
BY_SUITE = {"judge": "a", "instructions": "b"}, {"judge": "c", "instructions": "d"}
EVALUATION: tuple[Identity, ...] = (
    Identity(
        "evaluation.judges.interface.question",
        judged,
        {"asked": ASKED, "judge": "a", "item": "k", "pictures": ROLES, "names": ""},
        {
            "asked": dataclasses.replace(ASKED, text="is it blue?"),
            "judge": "b",
            "item": "l",
            "pictures": {**ROLES, "result": encoded(3)},
        },
        {"the files' names": {"names": "image-"}},
        through=["evaluation.store.Question.key"],
    ),
    Identity(
        "evaluation.judges.interface.question",
        lambda folder, **asked: judged(folder, Asked(**asked), "a", "k", ROLES),
        {field.name: getattr(ASKED, field.name) for field in dataclasses.fields(ASKED)},
        {
            "about": "pq",
            "roles": ("result", "source"),
            "text": "is it blue?",
            "seed": 2,
            "number": 1,
            "text_first": True,
            "like": None,
        },
    ),
    Identity(
        "evaluation.store.config_hash",
        lambda folder, **parts: config_hash(*parts.values()),
        {"first": "a", "second": {"b": 1, "c": 2}},
        {"first": "b", "second": {"b": 2, "c": 1}},
        {"the order of a dict": {"second": {"c": 2, "b": 1}}},
    ),
    Identity(
        "evaluation.store.Question.key",
        lambda folder, **parts: Question(**parts, ask=lambda: None).key,
        {"item": "a", "number": 0, "config": "c"},
        {"item": "b", "number": 1, "config": "d"},
    ),
    Identity(
        "evaluation.image_source.FileImages.digest",
        lambda folder, pictures: in_folder(folder, pictures).digest,
        {"pictures": PICTURES},
        {"pictures": OTHERS},
        {"the files' names": {"pictures": {"a/3.png": PICTURES["1.png"], "4.png": PICTURES["2.png"]}}},
    ),
    Identity(
        "evaluation.image_source.LooseImages.digest",
        lambda folder, pictures: LooseImages(in_folder(folder, pictures)).digest,
        {"pictures": PICTURES},
        {"pictures": SWAPPED},
    ),
    Identity(
        "evaluation.image_source.ImagePairs.digest",
        lambda folder, first, second: (
            ImagePairs(in_folder(folder / "1", first), in_folder(folder / "2", second)).digest
        ),
        {"first": PICTURES, "second": OTHERS},
        {"first": OTHERS, "second": PICTURES},
    ),
    Identity(
        "evaluation.image_source.NpzImages.digest",
        lambda folder, level, name: NpzImages.open(npz(folder, level, name)).digest,
        {"level": 1, "name": "a.npz"},
        {"level": 2},
        {"the file's name": {"name": "b.npz"}},
    ),
    *(
        Identity(
            "evaluation.image_source.RoleImages.of",
            role_images,
            {"size": 2, "time_s": 0},
            changed,
            through=["evaluation.image_source._state"],
        )
        for changed in ({"size": 3}, {"time_s": 1})
    ),
    Identity(
        "evaluation.reference.Reference.digest",
        lambda folder, pictures: Reference.open(in_folder(folder, pictures).paths[0].parent).digest,
        {"pictures": PICTURES},
        {"pictures": OTHERS},
    ),
    Identity(
        "evaluation.reference.Reference.digest",
        lambda folder, level, mean: Reference.open(npz(folder, level, mean=mean)).digest,
        {"level": 1, "mean": 0.0},
        {"level": 2, "mean": 1.0},
        through=["evaluation.reference._open_npz"],
    ),
    Identity(
        "evaluation.reference.Reference.digest",
        statistics,
        {"mean": 0.0, "deviation": 1.0, "name": "a.npz"},
        {"mean": 1.0, "deviation": 2.0},
        {"the file's name": {"name": "b.npz"}},
    ),
    Identity(
        "evaluation.features.feature_files.RowFiles",
        rows,
        {"function": "f", "pictures": PICTURES, "dim": 2, "kind": "features"},
        {"function": "g", "pictures": OTHERS, "dim": 3, "kind": "scores"},
        through=["evaluation.features.feature_files.RowFiles.__init__"],
    ),
    Identity(
        "evaluation.judges.vision_language.TransformersJudge.fingerprint",
        judge,
        {"weight": 1.0, "template": "t", "max_px": 64, "name": "x", "source": "here", **vars(Decoding())},
        {"weight": 2.0, "template": "u", "max_px": 32, **DECODED},
        {"the name": {"name": "y"}, "where the weights come from": {"source": "there"}},
        through=["evaluation.judges.vision_language.TransformersJudge.__init__"],
    ),
    Identity(
        "evaluation.judges.endpoint.EndpointJudge.fingerprint",
        lambda folder, url, model, **decoding: (
            EndpointJudge(url, model, decoding=Decoding(**decoding)).fingerprint
        ),
        {"url": "http://a/v1", "model": "m", **vars(Decoding())},
        {"model": "n", **DECODED},
        {"the address": {"url": "http://b/v1"}},
        through=["evaluation.judges.endpoint.EndpointJudge.__init__"],
    ),
    Identity(
        "evaluation.judges.detector.Mask2FormerDetector.fingerprint",
        lambda folder, weight, source: (
            Mask2FormerDetector(
                Numbers(weight, SimpleNamespace(num_labels=len(NAMES))), source=source
            ).fingerprint
        ),
        {"weight": 1.0, "source": "a"},
        {"weight": 2.0, "source": "b"},
        through=["evaluation.judges.detector.Mask2FormerDetector.__init__"],
    ),
    Identity(
        "evaluation.judges.colour.ClipColours.fingerprint",
        clip,
        {"weight": 1.0, "source": "a", "sentences": ("a {colour} {name}",)},
        {"weight": 2.0, "source": "b", "sentences": ("one {colour} {name}",)},
        through=["evaluation.judges.colour.ClipColours.__init__"],
    ),
    Identity(
        "evaluation.features.vision_transformers.VisionFeatures.fingerprint",
        vision,
        {"kind": "dinov2", "weight": 1.0, "input_px": 8, "source": "a"},
        {"kind": "clip", "weight": 2.0, "input_px": 16},
        {"where the weights come from": {"source": "b"}},
        through=["evaluation.features.vision_transformers.VisionFeatures.__init__"],
    ),
    Identity(
        "evaluation.features.representation.RepresentationFeatures.fingerprint",
        encoder_features,
        {**ENCODER, "run": "a", "name": "vit"},
        {"weight": 2.0, "input_px": 16, "mean": 0.4, "std": 0.4, "pooling": "class_token"},
        {"the run's name": {"run": "b"}, "the model's name": {"name": "other"}},
        through=["evaluation.features.representation.RepresentationFeatures.__init__"],
    ),
    Identity(
        "evaluation.features.inception.InceptionFeatures.fingerprint",
        lambda folder, weight, weights: InceptionFeatures(Numbers(weight), weights=weights).fingerprint,
        {"weight": 1.0, "weights": "a"},
        {"weight": 2.0},
        {"where the weights come from": {"weights": "b"}},
        through=["evaluation.features.inception.InceptionFeatures.__init__"],
    ),
    Identity(
        "evaluation.features.inception.AdmInception.fingerprint",
        adm,
        {"weight": 1.0, "head": 1.0},
        {"weight": 2.0, "head": 2.0},
        through=["evaluation.features.inception.AdmInception.__init__"],
    ),
    Identity(
        "evaluation.metrics.reconstruction.Lpips.fingerprint",
        lambda folder, weight: Lpips(Numbers(weight)).fingerprint,  # type: ignore[arg-type]
        {"weight": 1.0},
        {"weight": 2.0},
        through=["evaluation.metrics.reconstruction.Lpips.__init__"],
    ),
    Identity(
        "evaluation.suites.reconstruction.PairScores.fingerprint",
        lambda folder, lpips: PairScores(lpips and named(lpips)).fingerprint,
        {"lpips": "a"},
        {"lpips": "b"},
        through=["evaluation.suites.reconstruction.PairScores.__init__"],
    ),
    Identity(
        "evaluation.suites.reconstruction.ReconstructionSuite.fingerprints",
        reconstruction,
        {"lpips": "a", "features": "b"},
        {"lpips": None, "features": "c"},
    ),
    Identity(
        "evaluation.metrics.probe.LinearProbe.fingerprint",
        probe,
        HASHED,
        {"mean": [0.5], "std": [2.0], "weight": [[2.0]], "bias": [0.5]},
        {"how it was fitted": {"l2": 1.0}},
    ),
    Identity(
        "evaluation.linear_head.HeadClassifier.fingerprints",
        head_classifier,
        {"encoder": 1.0, "head": 1.0},
        {"encoder": 2.0, "head": 2.0},
        through=["evaluation.linear_head.HeadClassifier.__init__"],
    ),
    Identity(
        "evaluation.suites.linear_probe._RankedClasses.fingerprint",
        classes,
        {"fingerprints": {"encoder": "a", "head": "b"}, "protocol": {"input": "x"}},
        {"fingerprints": {"encoder": "a", "head": "c"}, "protocol": {"input": "y"}},
        through=["evaluation.suites.linear_probe._RankedClasses.__init__"],
    ),
    Identity(
        "evaluation.suites.linear_probe.LinearProbeSuite.fingerprints",
        lambda folder, one: dict(LinearProbeSuite(named(one, num_classes=9), folder).fingerprints),
        {"one": "a"},
        {"one": "b"},
        through=["evaluation.suites.linear_probe.Classifier.fingerprints"],
    ),
    Identity(
        "evaluation.suites.generation.GenerationSuite.fingerprints",
        generated,
        {"reference": "a", "features": {"dinov2": "b", "clip": "c"}},
        {"reference": "d", "features": {"dinov2": "b", "clip": "e"}},
    ),
    Identity("evaluation.suites.edit_benchmarks.GEditSuite.fingerprints", edited(GEditSuite), *BY_SUITE),
    Identity("evaluation.suites.edit_benchmarks.ImgEditSuite.fingerprints", edited(ImgEditSuite), *BY_SUITE),
    Identity(
        "evaluation.suites.dpg.DpgSuite.fingerprints",
        dpg,
        {"judge": "a", "questions": b"1"},
        {"judge": "b", "questions": b"2"},
    ),
    Identity(
        "evaluation.suites.geneval.GenEvalSuite._question",
        geneval,
        {"detector": "a", "colours": "b", "picture": b"1", "meta": TAG, "item": "k"},
        {
            "detector": "c",
            "colours": "d",
            "picture": b"2",
            "meta": {**TAG, "include": [{"class": "cup", "count": 2}]},
            "item": "l",
        },
        {"the prompt's words": {"meta": {**TAG, "prompt": "a cup that is red"}}},
        through=["evaluation.suites.geneval.GenEvalSuite.fingerprints"],
    ),
    Identity(
        "evaluation.benchmark_files.git_blob_hash",
        lambda folder, payload, name: benchmark_files.git_blob_hash(
            write_files(folder, {name: payload}) / name
        ),
        {"payload": b"a", "name": "x"},
        {"payload": b"b"},
        {"the file's name": {"name": "y"}},
    ),
    Identity(
        "evaluation.stage_set.reconstruct_samples",
        stage_images,
        {"payloads": {"a": b"1"}, "image_px": 8, "drawn_with": {"step": 1}},
        {"payloads": {"a": b"2"}, "image_px": 16, "drawn_with": {"step": 2}},
    ),
)
