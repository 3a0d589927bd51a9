"""Section `evaluation` of a training's config: what is scored on the way, and how often."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NoReturn

from base.bounds import Count, Steps
from base.config import ConfigError
from generator.class_conditional.sampling import ClassSamplingConfig
from generator.sampling import SamplingConfig
from launch.runs.evaluation_options import SUITES, add_suite_options

Option = bool | int | float | str


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, and how often."""

    every_steps: Steps
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

    num_images: Count = 5000
    """Drawn each time, of all classes together. Published numbers use 50,000."""
    sampling: ClassSamplingConfig | None = None
    """How they are drawn; None: as preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class PromptEvaluationConfig(EvaluationConfig):
    """Of a text-to-image or editing training."""

    prompts: str
    """File of prompts or edits (generator/prompts.py; launch/evaluate.py prompts writes those of benchmarks)."""
    images_per_prompt: Count = 1
    sampling: SamplingConfig | None = None
    """How they are drawn; None: as preview_sampling. The time shift is always flow.time_shift."""


@dataclass(frozen=True)
class StageEvaluationConfig(EvaluationConfig):
    """Of a tokenizer's stage."""

    shards: str
    """Validation images."""
    num_images: Count = 5000
    """The first ones are reconstructed each time. Published numbers use ImageNet's 50,000."""


class _Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"suites: {self.prog}: {message}; see launch/evaluate.py {self.prog} --help")
