"""Scores of the averaged weights every so many steps of a training, on all its ranks: section `evaluation` of a config.

RUN/scores.jsonl gets a line each time. RUN/evaluation/ holds step_XXXXXXXX/SUITE/ with what launch/evaluate.py writes,
the images of the last time and the reference's features.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from data.images import PixelConfig, PixelPacker
from data.shards import ShardDataset
from engine import distributed
from engine.config import ConfigError, UserError
from engine.distributed import Ranks
from engine.objective import Evaluation
from evaluation.class_set import draw_classes
from evaluation.runner import Suite, Team, evaluate
from evaluation.sampled_set import draw_prompts
from evaluation.stage_set import ROLES, reconstruct_samples
from generator.class_conditional.objective import ClassObjective
from generator.class_conditional.pipeline import ClassPipeline
from generator.class_conditional.sampling import ClassSamplingConfig
from generator.objective import FlowObjective
from generator.pipeline import Pipeline
from generator.prompts import read_prompts
from generator.sampling import SamplingConfig
from launch.evaluation_options import SUITES, add_suite_options
from tokenizer.autoencoders import load_autoencoder
from tokenizer.stage_objective import StageObjective

FOLDER = "evaluation"
WAIT_S = 6 * 3600
"""Ranks wait so long for the first one to score, which can take longer than any step."""
Option = bool | int | float | str
DrawSet = Callable[[Path, int, Team], int]
"""(folder of the image set, step, ranks) -> number of images."""
Start = Callable[[Ranks], Evaluation]
"""What is built once the ranks have met."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, and how often."""

    every_steps: int
    """Steps between two evaluations; one more follows the last step. Training waits meanwhile."""
    suites: dict[str, dict[str, Option]]
    """Suite -> its options, as `launch/evaluate.py SUITE --help` names them, without dashes:
    {generation: {reference: VIRTUAL_imagenet256_labeled.npz}}.
    """

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"every_steps is {self.every_steps}; it must be at least 1")
        if not self.suites:
            raise ConfigError("suites: names none; take the section 'evaluation' out, or name one")
        for suite in self.suites:
            if suite not in SUITES or suite == "linear":  # which scores an encoder's export, no images
                known = ", ".join(name for name in SUITES if name != "linear")
                raise ConfigError(f"suites: '{suite}' is none that a training can run; there are {known}")
            self.arguments(suite)

    def arguments(self, suite: str) -> argparse.Namespace:
        """The suite's options as its command line gives them. Raises ConfigError: an unknown one, one missing."""
        parser = _Strict(prog=suite, add_help=False, allow_abbrev=False)
        add_suite_options(suite, parser)
        words = []
        for name, value in self.suites[suite].items():
            option = f"--{name.replace('_', '-')}"
            words += [option] * value if isinstance(value, bool) else [f"{option}={value}"]
        return parser.parse_args(words)


@dataclass(frozen=True)
class ClassEvaluationConfig(EvaluationConfig):
    """Of a class-conditional training."""

    num_images: int = 5000
    """Drawn each time, of all classes together. Published numbers use 50,000."""
    sampling: ClassSamplingConfig | None = None
    """How they are drawn; None: as preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class PromptEvaluationConfig(EvaluationConfig):
    """Of a text-to-image or editing training."""

    prompts: str
    """File of prompts or edits (generator/prompts.py; launch/evaluate.py prompts writes those of benchmarks)."""
    images_per_prompt: int = 1
    sampling: SamplingConfig | None = None
    """How they are drawn; None: as preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class StageEvaluationConfig(EvaluationConfig):
    """Of a tokenizer's stage."""

    shards: str
    """Validation images."""
    num_images: int = 5000
    """The first ones are reconstructed each time. Published numbers use ImageNet's 50,000."""


class TrainingScores:
    """Draws an image set with the weights that are in the model, and scores it; implements engine.objective.Evaluation.

    The suites' networks are loaded each time and dropped again: a training needs the memory.
    """

    def __init__(self, config: EvaluationConfig, run_dir: Path, ranks: Ranks, draw: DrawSet) -> None:
        """Collective."""
        self.every_steps = config.every_steps
        self._config, self._folder, self._draw = config, run_dir / FOLDER, draw
        self._device = ranks.device
        patient = distributed.patient(ranks, WAIT_S)
        self._team = Team(patient.rank, patient.world, patient.barrier, patient.gather)

    def run(self, step: int) -> Mapping[str, float]:
        """`SUITE/METRIC` -> value."""
        team, images, store = self._team, self._folder / "images", self._folder / "store"
        if team.rank == 0:
            for stale in (images, store):
                shutil.rmtree(stale, ignore_errors=True)
        team.barrier()
        self._draw(images, step, team)
        scores: dict[str, float] = {}
        for name in self._config.suites:
            out = self._folder / f"step_{step:08d}" / name
            suite = _load(self._config, name, self._folder, str(self._device))
            found = evaluate(suite, images, out, team=team).get("scores", {})
            del suite
            for metric, entry in found.items():
                scores[f"{name}/{metric}"] = math.nan if entry["mean"] is None else entry["mean"]
        team.barrier()
        if team.rank == 0:
            shutil.rmtree(store, ignore_errors=True)  # gigabytes that serve nobody again
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return scores


def of_class(
    config: ClassEvaluationConfig,
    run_dir: str,
    objective: ClassObjective,
    autoencoder: str | None,
    sampling: ClassSamplingConfig,
    *,
    bf16: bool,
) -> Start:
    """`sampling`: where the config has none. `bf16`: the weights are. Raises UserError: as `check`; no autoencoder."""
    check(config, ("result",))
    decoder = _named(autoencoder)
    shift = sampling.time_shift
    chosen = dataclasses.replace(config.sampling or sampling, time_shift=shift)

    def start(ranks: Ranks) -> Evaluation:
        def draw(out: Path, step: int, team: Team) -> int:
            pipeline = ClassPipeline(
                objective.generator, load_autoencoder(decoder).to(ranks.device), bf16=bf16
            )
            number = config.num_images
            return draw_classes(
                pipeline, out, chosen, number, drawn_with={"step": step}, team=team, in_step=True
            )

        return TrainingScores(config, Path(run_dir), ranks, draw)

    return start


def of_prompts(
    config: PromptEvaluationConfig,
    run_dir: str,
    objective: FlowObjective,
    autoencoder: str | None,
    sampling: SamplingConfig,
    *,
    bf16: bool,
) -> Start:
    """As `of_class`. Raises UserError: a file of prompts that cannot be read, too."""
    decoder, prompts = _named(autoencoder), Path(config.prompts)
    chosen = dataclasses.replace(config.sampling or sampling, time_shift=sampling.time_shift)
    roles = ("result", "source") if any(prompt.images for prompt in read_prompts(prompts)) else ("result",)
    check(config, roles)

    def start(ranks: Ranks) -> Evaluation:
        def load() -> Pipeline:
            model = load_autoencoder(decoder).to(ranks.device)
            return Pipeline(objective.model, model, objective.text_tokenizer, bf16=bf16)

        def draw(out: Path, step: int, team: Team) -> int:
            number = config.images_per_prompt
            return draw_prompts(
                load, prompts, out, chosen, number, drawn_with={"step": step}, team=team, in_step=True
            )

        return TrainingScores(config, Path(run_dir), ranks, draw)

    return start


def of_stage(
    config: StageEvaluationConfig,
    run_dir: str,
    objective: StageObjective,
    pixels: PixelConfig,
    *,
    bf16: bool,
) -> Start:
    """Images are fitted as launch/reconstruct.py fits them. Raises UserError: as `check`; no such shards, latents."""
    check(config, ROLES)
    dataset = ShardDataset.open(config.shards)
    fitted = PixelConfig(pixels.images_per_pack, pixels.image_px)
    PixelPacker(fitted).lengths(dataset)

    def start(ranks: Ranks) -> Evaluation:
        def draw(out: Path, step: int, team: Team) -> int:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
                return reconstruct_samples(
                    objective.model,
                    dataset,
                    fitted,
                    out,
                    config.num_images,
                    drawn_with={"step": step},
                    team=team,
                    in_step=True,
                )

        return TrainingScores(config, Path(run_dir), ranks, draw)

    return start


def check(config: EvaluationConfig, roles: Sequence[str]) -> None:
    """Loads every suite once, so that what is missing is missed before the training. Raises UserError."""
    for name in config.suites:
        suite = _load(config, name, Path(FOLDER), "cpu")
        if lacking := [role for role in suite.roles if role not in roles]:
            raise UserError(
                f"evaluation: suite '{name}' needs images '{', '.join(lacking)}', this training makes "
                f"{', '.join(roles)}; name another suite"
            )


def _load(config: EvaluationConfig, name: str, folder: Path, device: str) -> Suite:
    arguments = config.arguments(name)
    arguments.store = folder / "store"
    if getattr(arguments, "reference_store", arguments) is None:
        arguments.reference_store = folder / "reference"
    return SUITES[name](arguments, device)


class _Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"suites: {self.prog}: {message}; see launch/evaluate.py {self.prog} --help")


def _named(autoencoder: str | None) -> str:
    if autoencoder is None:
        raise UserError(
            "evaluation draws images: set 'autoencoder', the export that the latents were made with"
        )
    return autoencoder
