"""The configs of all kinds of runs. A training's config names its task (launch/runs/tasks.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from base.bounds import Count
from base.config import ConfigError
from data.config import ClassPackingConfig, DataConfig, PackingConfig, PixelConfig
from engine.engine_config import EngineConfig
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig, DitConfig
from generator.config import FlowConfig, GeneratorConfig, Task
from generator.sampling_config import SamplingConfig
from launch.runs.periodic_config import (
    ClassEvaluationConfig,
    PromptEvaluationConfig,
    StageEvaluationConfig,
)
from tokenizer.config import CONFIG_NAME, EncodeConfig, read_config
from tokenizer.training.stage_config import StageConfig


@dataclass(frozen=True)
class PixelRun:
    """The sections of every training on pixels. Reading the config compares settings that must agree."""

    run_dir: str
    """Folder of checkpoints, logs, samples and the export. A repeated command continues there."""
    data: DataConfig
    pixels: PixelConfig
    engine: EngineConfig


@dataclass(frozen=True)
class TokenizerRun(PixelRun):
    """A training of one stage of the tokenizer."""

    stage: StageConfig
    preview_shards: str | None = None
    """Validation shards, of which the sample grids reconstruct the first images."""
    num_preview_images: Count = 16
    evaluation: StageEvaluationConfig | None = None
    """Scores during the training; None: no scores."""
    task: Literal["tokenizer"] = "tokenizer"

    def __post_init__(self) -> None:
        stage = self.stage
        found, where = stage.autoencoder, "stage.autoencoder"
        if stage.init_from is not None and (Path(stage.init_from) / CONFIG_NAME).is_file():
            found, where = read_config(stage.init_from), stage.init_from
        if found is not None and found.image_px != self.pixels.image_px:
            raise ConfigError(
                f"pixels.image_px is {self.pixels.image_px}, image_px of {where} is {found.image_px}; make them equal"
            )
        if stage.weighs_pivot and self.engine.zero_stage == 3:
            raise ConfigError(
                "stage.adaptive_pivot and engine.zero_stage 3 do not go together; set engine.zero_stage 1"
            )
        if stage.gan is None:
            return
        if self.engine.adversary_optimizer is None:
            raise ConfigError(
                "stage.discriminator is trained by engine.adversary_optimizer, which is not set; set it"
            )
        if self.engine.zero_stage == 3:  # the loss reads the weights outside the engine's forward
            raise ConfigError(
                "stage.discriminator and engine.zero_stage 3 do not go together; set engine.zero_stage 1"
            )


@dataclass(frozen=True)
class GeneratorRun:
    """A training of text-to-image or editing on latent shards."""

    run_dir: str
    """Folder of checkpoints, logs, samples and the export. A repeated command continues there."""
    data: DataConfig
    packing: PackingConfig
    text_tokenizer: str
    """Name or folder of the text tokenizer."""
    generator: GeneratorConfig
    engine: EngineConfig
    task: Task
    """What is learned: `t2i` (text-to-image) or `edit`."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    autoencoder: str | None = None
    """Exported autoencoder that decodes the sample grids; None: no grids."""
    preview_shards: str | None = None
    """Validation latents, of which the sample grids draw the first captions (and sources)."""
    num_preview_images: Count = 8
    preview_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the grids, and the default of sample.py. The time shift is always flow.time_shift."""
    evaluation: PromptEvaluationConfig | None = None
    """Scores during the training; None: no scores."""

    def __post_init__(self) -> None:
        if self.packing.max_side != self.generator.max_side:
            raise ConfigError(
                f"packing.max_side {self.packing.max_side} and generator.max_side {self.generator.max_side} number the "
                "same position table; make them equal"
            )
        if self.flow.text_loss_weight and not self.generator.text_output:
            raise ConfigError(
                f"flow.text_loss_weight is {self.flow.text_loss_weight:g}, which needs generator.text_output: true"
            )
        if self.generator.text_output and not self.flow.text_loss_weight:
            raise ConfigError(
                "generator.text_output is true, but flow.text_loss_weight is 0; set one of them right"
            )
        if self.task == "t2i" and self.flow.text_loss_weight:
            raise ConfigError(
                f"flow.text_loss_weight is {self.flow.text_loss_weight:g}, but only interleaved samples mark text for "
                "a loss: train those with task edit, or set it to 0 and generator.text_output to false"
            )
        _check_decoder(self.evaluation, self.autoencoder)
        _check_compile(self.flow.compile, self.engine)

    @property
    def sampling(self) -> SamplingConfig:
        """`preview_sampling` with the training's time shift, for grids, sample.py and exports."""
        return dataclasses.replace(self.preview_sampling, time_shift=self.flow.time_shift)


@dataclass(frozen=True)
class ClassRun:
    """A training of class-conditional generation on latent shards."""

    run_dir: str
    """Folder of checkpoints, logs, samples and the export. A repeated command continues there."""
    data: DataConfig
    packing: ClassPackingConfig
    generator: DitConfig
    engine: EngineConfig
    flow: ClassFlowConfig = field(default_factory=ClassFlowConfig)
    autoencoder: str | None = None
    """Export that decodes the sample grids; None: no grids."""
    num_preview_images: Count = 16
    """Images of a sample grid, whose classes are spread evenly over all classes."""
    preview_sampling: ClassSamplingConfig = field(default_factory=ClassSamplingConfig)
    evaluation: ClassEvaluationConfig | None = None
    """Scores during the training; None: no scores."""
    task: Literal["class"] = "class"

    def __post_init__(self) -> None:
        align = self.flow.align
        if align is not None and align.layer > self.generator.num_layers:
            raise ConfigError(
                f"flow.align.layer {align.layer}: the backbone has {self.generator.num_layers} layers "
                "(generator.num_layers); lower it"
            )
        _check_decoder(self.evaluation, self.autoencoder)
        _check_compile(self.flow.compile, self.engine)

    @property
    def sampling(self) -> ClassSamplingConfig:
        """`preview_sampling` with the training's time shift, for sample_class.py and evaluations."""
        return dataclasses.replace(self.preview_sampling, time_shift=self.flow.time_shift)


Run = TokenizerRun | GeneratorRun | ClassRun
"""A training that launch/train_*.py starts."""


def _check_decoder(evaluation: object, autoencoder: str | None) -> None:
    if evaluation is not None and autoencoder is None:
        raise ConfigError(
            "evaluation draws images: set 'autoencoder', the export that the latents were made with"
        )


@dataclass(frozen=True)
class EncodeRun(EncodeConfig):
    """Encoding of one data set, and of others with its statistics."""

    also: dict[str, str] = field(default_factory=dict)
    """Further data sets, as shards: out. They are encoded alike, with the first set's mean and deviation."""

    def configs(self) -> list[EncodeConfig]:
        """One config for each data set, that of `shards` first."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(EncodeConfig)}
        first = EncodeConfig(**common)
        statistics_from = self.statistics_from or self.out
        further = [
            dataclasses.replace(first, shards=shards, out=out, statistics_from=statistics_from)
            for shards, out in self.also.items()
        ]
        return [first, *further]


def _check_compile(is_on: bool, engine: EngineConfig) -> None:
    if is_on and engine.zero_stage == 3:
        raise ConfigError(
            "flow.compile is true and engine.zero_stage 3: compiled layers read weights that ZeRO-3 took away; set "
            "flow.compile to false or engine.zero_stage to 1 or 2"
        )
