"""Section `evaluation` of a training's config: what is scored during the training, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from base.bounds import Count, Steps
from base.config import ConfigError, from_dict
from generator.class_conditional.config import ClassSamplingConfig
from generator.sampling_config import SamplingConfig
from launch.runs.suites import SUITES, SuiteOptions

Option = bool | int | float | str


@dataclass(frozen=True)
class EvaluationConfig:
    """The fields that all kinds of trainings share."""

    every_steps: Steps
    """Steps between two evaluations, for which the training waits; another evaluation follows the last step."""
    suites: dict[str, dict[str, Option]]
    """Suite -> its options, fields of its dataclass in launch/runs/suites.py:
    {generation: {reference: VIRTUAL_imagenet256_labeled.npz}}. `launch/evaluate.py SUITE --help` explains them.
    """

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"every_steps is {self.every_steps}; it must be at least 1")
        if not self.suites:
            raise ConfigError("suites: names none; take the section 'evaluation' out, or name one")
        for suite in self.suites:
            if suite not in SUITES or suite == "linear":  # linear scores an encoder's export, not images
                known = ", ".join(name for name in SUITES if name != "linear")
                raise ConfigError(f"suites: '{suite}' is none that a training can run; there are {known}")
            self.options(suite)

    def options(self, suite: str) -> SuiteOptions:
        """The options of one suite. Raises ConfigError: an option is unknown, missing or out of bounds."""
        return from_dict(SUITES[suite], self.suites[suite], where=f"suites.{suite}")


@dataclass(frozen=True)
class ClassEvaluationConfig(EvaluationConfig):
    """The section of a class-conditional training."""

    num_images: Count = 5000
    """Images drawn each time, of all classes together. Published scores use 50,000."""
    sampling: ClassSamplingConfig | None = None
    """Sampling of the images; None: preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class PromptEvaluationConfig(EvaluationConfig):
    """The section of a text-to-image or editing training."""

    prompts: str
    """File of prompts or edits (generator/prompts.py). `launch/evaluate.py prompts` writes those of benchmarks."""
    images_per_prompt: Count = 1
    sampling: SamplingConfig | None = None
    """Sampling of the images; None: preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class StageEvaluationConfig(EvaluationConfig):
    """The section of a tokenizer stage."""

    shards: str
    """Shards of validation images."""
    num_images: Count = 5000
    """How many of the first validation images are reconstructed each time. Published scores use ImageNet's 50,000."""
