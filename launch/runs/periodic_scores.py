"""Scores the averaged weights at regular steps of a training, on all its ranks: section `evaluation` of a config.

Each evaluation adds a line to RUN/scores.jsonl. RUN/evaluation/ holds step_XXXXXXXX/SUITE/ with the files of
launch/evaluate.py, the last evaluation's images, and the reference's features.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from base.config import UserError
from base.objective import Evaluation, Objective
from base.team import Team
from data.config import PixelConfig
from data.samples.images import PixelPacker
from data.shards import ShardDataset
from engine import distributed
from engine.distributed import Ranks
from evaluation.runner import Suite, evaluate
from evaluation.stage_set import ROLES, reconstruct_samples
from generator.class_conditional.class_set import draw_classes
from generator.class_conditional.objective import ClassObjective
from generator.class_conditional.pipeline import ClassPipeline
from generator.objective import FlowObjective
from generator.pipeline import Pipeline
from generator.prompt_set import draw_prompts
from generator.prompts import read_prompts
from generator.sampling_config import DrawingConfig
from launch.runs.configs import ClassRun, GeneratorRun, PixelRun, TokenizerRun
from launch.runs.periodic_config import EvaluationConfig
from launch.runs.suites import GenerationOptions, build
from tokenizer.autoencoders import load_autoencoder
from tokenizer.config import read_tree
from tokenizer.training.objective_base import StageObjective

FOLDER = "evaluation"
WAIT_S = 6 * 3600
"""How long ranks wait while the first rank scores, which can take longer than any step."""
DrawSet = Callable[[Path, int, Any, Ranks, Team], None]
"""Draws an image set: folder, step, the training's objective, this rank and its device, all ranks."""
SamplingT = TypeVar("SamplingT", bound=DrawingConfig)
Start = Callable[[Ranks, Any], Evaluation]
"""Builds the evaluation of an objective, once the ranks have met. Collective."""


class TrainingScores:
    """Draws an image set with the weights now in the model, and scores it. Implements base.objective.Evaluation.

    The suites' networks are loaded for each evaluation and dropped afterwards, because the training needs the memory.
    """

    def __init__(
        self, config: EvaluationConfig, run_dir: Path, draw: DrawSet, ranks: Ranks, objective: Objective
    ) -> None:
        """`draw`: draws the set; `objective`: owns the model. Collective."""
        self.every_steps = config.every_steps
        self._config, self._folder, self._draw = config, run_dir / FOLDER, draw
        self._ranks, self._objective = ranks, objective
        patient = distributed.patient(ranks, WAIT_S)
        self._team = Team(patient.rank, patient.world, patient.barrier, patient.gather)

    def run(self, step: int) -> Mapping[str, float]:
        """Draws and scores: `SUITE/METRIC` -> value. Collective."""
        team, images, store = self._team, self._folder / "images", self._folder / "store"
        if team.rank == 0:
            for stale in (images, store):
                shutil.rmtree(stale, ignore_errors=True)
        team.barrier()
        self._draw(images, step, self._objective, self._ranks, team)
        scores: dict[str, float] = {}
        for name in self._config.suites:
            out = self._folder / f"step_{step:08d}" / name
            suite = _load(self._config, name, self._folder, str(self._ranks.device))
            found = evaluate(suite, images, out, team=team).get("scores", {})
            del suite
            for metric, entry in found.items():
                scores[f"{name}/{metric}"] = math.nan if entry["mean"] is None else entry["mean"]
        team.barrier()
        if team.rank == 0:
            shutil.rmtree(store, ignore_errors=True)  # gigabytes without further use
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return scores


def start_of(run: PixelRun | GeneratorRun | ClassRun) -> Start | None:
    """What starts the config's evaluation; None: it asks for no scores. Raises UserError: an input is missing."""
    if isinstance(run, ClassRun):
        return _of_class(run)
    if isinstance(run, GeneratorRun):
        return _of_prompts(run)
    return _of_stage(run) if isinstance(run, TokenizerRun) else None


def _of_class(run: ClassRun) -> Start | None:
    config = run.evaluation
    if config is None:
        return None
    check(config, ("result",))
    autoencoder, sampling = _named(run.autoencoder), _sampling(config.sampling, run.sampling)

    def draw(out: Path, step: int, objective: ClassObjective, ranks: Ranks, team: Team) -> None:
        decoder = load_autoencoder(autoencoder).to(ranks.device)
        pipeline = ClassPipeline(objective.generator, decoder, bf16=_is_bf16(run))
        number, made_by = config.num_images, {"step": step}
        draw_classes(pipeline, out, sampling, number, drawn_with=made_by, team=team, in_step=True)

    return partial(TrainingScores, config, Path(run.run_dir), draw)


def _of_prompts(run: GeneratorRun) -> Start | None:
    config = run.evaluation
    if config is None:
        return None
    prompts = Path(config.prompts)
    roles = ("result", "source") if any(prompt.images for prompt in read_prompts(prompts)) else ("result",)
    check(config, roles)
    autoencoder, sampling = _named(run.autoencoder), _sampling(config.sampling, run.sampling)

    def draw(out: Path, step: int, objective: FlowObjective, ranks: Ranks, team: Team) -> None:
        def load() -> Pipeline:
            decoder = load_autoencoder(autoencoder).to(ranks.device)
            return Pipeline(objective.model, decoder, objective.text_tokenizer, bf16=_is_bf16(run))

        number, made_by = config.images_per_prompt, {"step": step}
        draw_prompts(load, prompts, out, sampling, number, drawn_with=made_by, team=team, in_step=True)

    return partial(TrainingScores, config, Path(run.run_dir), draw)


def _of_stage(run: TokenizerRun) -> Start | None:
    """The evaluation of a tokenizer stage, which fits images as launch/reconstruct.py does."""
    config = run.evaluation
    if config is None:
        return None
    check(config, ROLES)
    dataset = ShardDataset.open(config.shards)
    pixels = PixelConfig(run.pixels.images_per_pack, run.pixels.image_px)
    PixelPacker(pixels).lengths(dataset)

    def draw(out: Path, step: int, objective: StageObjective, ranks: Ranks, team: Team) -> None:
        number, made_by = config.num_images, {"step": step}
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=_is_bf16(run)):
            reconstruct_samples(
                objective.model, dataset, pixels, out, number, drawn_with=made_by, team=team, in_step=True
            )

    return partial(TrainingScores, config, Path(run.run_dir), draw)


def check(config: EvaluationConfig, roles: Sequence[str]) -> None:
    """Loads every suite once, so that missing files are found before the training. Raises UserError."""
    for name in config.suites:
        suite = _load(config, name, Path(FOLDER), "cpu")
        if lacking := [role for role in suite.roles if role not in roles]:
            raise UserError(
                f"evaluation: suite '{name}' needs images '{', '.join(lacking)}', this training makes "
                f"{', '.join(roles)}; name another suite"
            )


def _load(config: EvaluationConfig, name: str, folder: Path, device: str) -> Suite:
    options = config.options(name)
    if isinstance(options, GenerationOptions) and options.reference_store is None:
        options = dataclasses.replace(options, reference_store=folder / "reference")
    return build(options, folder / "store", device)


def _sampling(chosen: SamplingT | None, default: SamplingT) -> SamplingT:
    """The chosen sampling (None: the default) with the training's time shift."""
    return default if chosen is None else dataclasses.replace(chosen, time_shift=default.time_shift)


def _is_bf16(run: PixelRun | GeneratorRun | ClassRun) -> bool:
    """Whether the run's weights are bf16, so that only bf16 inference is possible."""
    return run.engine.precision == "bf16"


def _named(autoencoder: str | None) -> str:
    assert autoencoder is not None, "the run's config was to refuse that"
    read_tree(autoencoder)
    return autoencoder
