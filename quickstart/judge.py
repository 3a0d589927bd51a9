"""The judge of emoji scenes: which objects an image shows, and on which background colour.

The common training loop trains the judge on real renders. It never sees an image that a model made. Light
augmentation keeps it from judging a decoder's softness instead of the image's content.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from base import config, files
from base.config import UserError
from base.objective import LossOutput, WithoutAdversary
from data.packs.transfer import to_device
from data.samples.images import PixelBatch
from quickstart.config import JudgeConfig
from quickstart.judge_network import (
    CELL_PX,
    JudgeNetwork,
    SceneClasses,
    cell_loss,
    object_evidence,
    scene_targets,
)
from tokenizer.weights import load_model, read_tensors, state_hash, write_tensors

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
THRESHOLD = 0.5  # probability at and above which an object counts as seen
BACKGROUND_WEIGHT = 0.5  # factor of the background's loss; an easy task needs little
IMAGES_PER_CALL = 64
BLURS = 3  # 3 x 3 boxes, one after the other, each mixed in with a random share
BLUR_PROBABILITY = 0.6  # probability of each blur


@dataclass(frozen=True)
class Verdict:
    """The objects and the background that the judge sees in one image."""

    objects: tuple[str, ...]  # names with a score of at least THRESHOLD, best first
    object_scores: Mapping[str, float]  # probability in [0, 1] of every object's presence
    centres: Mapping[str, tuple[float, float]]  # x, y in pixels of every object's most probable cell
    background: str  # name of the most probable colour


@dataclass(frozen=True)
class JudgeExport:
    """The content of config.json beside the weights."""

    judge: JudgeConfig
    classes: SceneClasses


class Judge:
    """A trained judge. `fingerprint` hashes its classes and weights."""

    def __init__(self, classes: SceneClasses, network: JudgeNetwork) -> None:
        self.classes = classes
        self.network = network.eval()
        self.fingerprint = files.digest([config.to_dict(classes), state_hash(network)])

    @classmethod
    def load(cls, directory: str | Path) -> Judge:
        """Loads what JudgeObjective exported. Raises UserError: missing, damaged or mismatched files."""
        directory = Path(directory)
        path = directory / CONFIG_NAME
        if not path.is_file():
            raise UserError(f"{path}: no such file; train the judge first")
        export = config.from_dict(JudgeExport, files.read_object(path), where=str(path))
        weights = directory / WEIGHTS_NAME
        build = functools.partial(JudgeNetwork, export.judge, export.classes)
        network = load_model(build, read_tensors(weights), str(weights), path)
        return cls(export.classes, network)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> list[Verdict]:
        """One verdict for each image of uint8 [B, 3, H, W]."""
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4
        return [verdict for part in torch.split(pixels, IMAGES_PER_CALL) for verdict in self._look(part)]

    def _look(self, pixels: Tensor) -> list[Verdict]:
        cell_logits, background_logits = self.network(pixels.float() / 255)
        probabilities, cells = object_evidence(cell_logits)
        rows = torch.div(cells, cell_logits.shape[-1], rounding_mode="floor")
        columns = cells % cell_logits.shape[-1]
        centres_px = (torch.stack([columns, rows], 2) + 0.5) * CELL_PX
        verdicts = []
        for scores, places, background in zip(
            probabilities.tolist(), centres_px.tolist(), background_logits.argmax(1).tolist(), strict=True
        ):
            named = dict(zip(self.classes.objects, scores, strict=True))
            seen = sorted((name for name in named if named[name] >= THRESHOLD), key=lambda n: -named[n])
            centres = {name: (x, y) for name, (x, y) in zip(self.classes.objects, places, strict=True)}
            verdicts.append(Verdict(tuple(seen), named, centres, self.classes.backgrounds[background]))
        return verdicts


class JudgeObjective(WithoutAdversary):
    """Trains the judge on PixelBatch with meta[i]["scene"]; implements base.objective.Objective."""

    name = "judge"

    def __init__(self, judge_config: JudgeConfig, classes: SceneClasses) -> None:
        self.config = JudgeExport(judge_config, classes)
        # Every layer draws its initial weights from the CPU's generator; its state is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(judge_config.seed)
            self.model = JudgeNetwork(judge_config, classes)

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)

    def count(self, batch: PixelBatch) -> int:
        """Images in the micro-batch."""
        return len(batch.sample_ids)

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """Cross entropies of cells and background; metrics: share of images with the exact set of objects,
        and with the right background. Raises UserError: a sample without a scene, an unknown class."""
        device = batch.pixels.device
        scenes = [meta.get("scene", {}) for meta in batch.meta]
        cells, backgrounds = scene_targets(scenes, self.config.classes, batch.pixels.shape[-1])
        cells, backgrounds = to_device((cells, backgrounds), device)
        generator = torch.Generator(device).manual_seed(batch.seed)
        cell_logits, background_logits = self.model(augment(batch.pixels_01, generator))
        objects = cell_loss(cell_logits, cells).sum()
        background = F.cross_entropy(background_logits.float(), backgrounds, reduction="sum")
        with torch.no_grad():
            seen = object_evidence(cell_logits)[0] >= THRESHOLD
            kinds = torch.where(cells < 0, -1 - cells, cells).flatten(1)
            asked = F.one_hot(kinds, seen.shape[1] + 1).amax(1)[:, :-1].bool()
            object_right = (seen == asked).all(1).sum().float()
            background_right = (background_logits.argmax(1) == backgrounds).sum().float()
        return LossOutput(
            objects + BACKGROUND_WEIGHT * background,
            {
                "object_loss": objects.detach(),
                "background_loss": background.detach(),
                "object_right": object_right,
                "background_right": background_right,
            },
        )

    def samples(self) -> npt.NDArray[np.uint8] | None:
        """None: a classifier makes no images."""
        return None

    def export(self, directory: Path) -> None:
        """Writes model.safetensors and config.json, which `Judge.load` reads."""
        write_tensors(directory / WEIGHTS_NAME, self.model)
        files.write_json(directory / CONFIG_NAME, config.to_dict(self.config))

    def fingerprints(self) -> Mapping[str, str]:
        """Hash of classes, sizes and seed; no weights were loaded."""
        return {"judge": files.digest(config.to_dict(self.config))}

    def describe(self) -> list[str]:
        """A description of the judge, in one line."""
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        classes = self.config.classes
        num_objects, num_backgrounds = len(classes.objects), len(classes.backgrounds)
        return [f"judge: {size:.2f} M parameters, {num_objects} objects, {num_backgrounds} backgrounds"]


def augment(pixels_01: Tensor, generator: torch.Generator) -> Tensor:
    """Small changes that a decoder also makes: gain and offset per channel, blur, pixel noise.

    float32 [B, 3, H, W] in [0, 1], in and out. The changes are weak enough that skin tones stay apart, and strong
    enough that renders blurred down to 26 dB are judged as well as sharp ones (docs/architecture.md).
    """
    B, device = len(pixels_01), pixels_01.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform() -> Tensor:
        return torch.rand((B, 1, 1, 1), generator=generator, device=device)

    x = pixels_01 * (1 + 0.06 * normal(B, 3, 1, 1)) + 0.03 * normal(B, 3, 1, 1)
    for _ in range(BLURS):
        x = x + uniform() * (uniform() < BLUR_PROBABILITY) * (_box_blur(x) - x)
    return (x + 0.06 * uniform() * normal(*x.shape)).clamp(0, 1)


def _box_blur(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, edges repeated. The separable form is three times as fast as pooling on the CPU."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    return (x[..., :-2] + x[..., 1:-1] + x[..., 2:]) / 9
