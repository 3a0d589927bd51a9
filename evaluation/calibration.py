"""Compares an installation's scores with the published scores of known image sets.

A person who calibrates has the known set: ADM's published samples, ImageNet's validation set, or images drawn with a
public model. A score within its tolerance says that weights, preparation and arithmetic are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from base.config import UserError


@dataclass(frozen=True)
class Expected:
    """One expected number and its tolerance."""

    metric: str
    value: float
    tolerance: float
    group: str | None = None
    """Group in scores.json; None: the score over all items."""


@dataclass(frozen=True)
class Known:
    """An image set with known scores."""

    name: str
    suite: str
    """The suite's name in scores.json."""
    what: str
    source: str
    expected: tuple[Expected, ...]


KNOWN = (
    Known(
        "adm",
        "generation",
        "admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz",
        "README of openai/guided-diffusion, evaluations; a faithful torch port has FID 3.9410",
        (
            Expected("fid", 3.9426, 0.01),
            Expected("sfid", 6.1404, 0.05),
            Expected("inception_score", 215.84, 0.5),
            # ADM's numbers need fp16 distances (evaluate with --distances fp16); fp32 gives 0.18 and 0.25 points less.
            Expected("precision", 0.8265, 0.003),
            Expected("recall", 0.5309, 0.004),
        ),
    ),
    Known(
        "dinov2-b-reg",
        "linear_probe",
        "ImageNet's validation set, untouched DINOv2 ViT-B with registers, its published head",
        "about 84.4 by this protocol; RPiAE's Table 9 has 84.56 for DINOv2-B",
        (Expected("top1", 0.844, 0.003),),
    ),
    Known(
        "sdxl",
        "geneval",
        "four images of each plain prompt by Stable Diffusion XL base",
        "README of djghosh13/geneval; another detector and other seeds move it by a point or two",
        (
            Expected("geneval", 0.55, 0.02),
            Expected("correct", 0.98, 0.03, "single_object"),
            Expected("correct", 0.74, 0.05, "two_object"),
            Expected("correct", 0.39, 0.05, "counting"),
            Expected("correct", 0.85, 0.05, "colors"),
            Expected("correct", 0.15, 0.05, "position"),
            Expected("correct", 0.23, 0.05, "color_attr"),
        ),
    ),
    Known(
        "sd-1.5",
        "geneval",
        "four images of each plain prompt by Stable Diffusion 1.5",
        "README of djghosh13/geneval",
        (
            Expected("geneval", 0.43, 0.02),
            Expected("correct", 0.97, 0.03, "single_object"),
            Expected("correct", 0.38, 0.05, "two_object"),
            Expected("correct", 0.35, 0.05, "counting"),
            Expected("correct", 0.76, 0.05, "colors"),
            Expected("correct", 0.04, 0.05, "position"),
            Expected("correct", 0.06, 0.05, "color_attr"),
        ),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """An expected number beside the measured one; `measured` None: not measured."""

    expected: Expected
    measured: float | None

    @property
    def holds(self) -> bool:
        """Whether the two numbers agree within the tolerance."""
        return (
            self.measured is not None and abs(self.measured - self.expected.value) <= self.expected.tolerance
        )

    def line(self) -> str:
        """The verdict as one line for people."""
        name = (
            self.expected.metric
            if self.expected.group is None
            else f"{self.expected.group} {self.expected.metric}"
        )
        measured = "not measured" if self.measured is None else f"{self.measured:.4g}"
        sign = "agrees" if self.holds else "DIFFERS"
        return (
            f"{name}: {measured}, expected {self.expected.value:.4g} +- {self.expected.tolerance:g}: {sign}"
        )


def known_of(suite: str) -> list[str]:
    """Names of a suite's known sets. The command `linear` stands for the suite `linear_probe`."""
    return [one.name for one in KNOWN if one.suite in (suite, f"{suite}_probe")]


def known(name: str) -> Known:
    """The known set of this name. Raises UserError: no such set."""
    for one in KNOWN:
        if one.name == name:
            return one
    raise UserError(
        f"no known set '{name}'; there are {', '.join(f'{one.name} ({one.suite})' for one in KNOWN)}"
    )


def compare(of: Known, scores: Mapping[str, Any]) -> list[Verdict]:
    """Compares every expected number with scores.json. Raises UserError: scores of another suite, or partial scores."""
    if scores["suite"] != of.suite:
        raise UserError(f"scores are of suite '{scores['suite']}'; '{of.name}' is a set of '{of.suite}'")
    if scores["partial"]:
        raise UserError(
            f"scores are partial ({scores['n_failed']} images missing); calibrate on the whole set"
        )
    verdicts = []
    for expected in of.expected:
        table = scores["scores"] if expected.group is None else scores["groups"].get(expected.group, {})
        verdicts.append(Verdict(expected, table.get(expected.metric, {}).get("mean")))
    return verdicts
