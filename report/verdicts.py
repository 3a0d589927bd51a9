"""The targets of the quickstart, and whether a run reaches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from report.run_contents import ReportInput


@dataclass(frozen=True)
class Target:
    """A number to reach, and where it is measured."""

    label: str
    evaluation: str  # folder under evaluation/
    metric: str
    at_least: float
    unit: str = ""


@dataclass(frozen=True)
class Outcome:
    """A target beside the measured value; `value` None: not measured yet."""

    label: str
    value: float | None
    low: float | None  # 95 % confidence interval, None without one
    high: float | None
    n: int
    asked: float
    unit: str
    at_most: bool = False  # the target is an upper bound

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None: not measured."""
        if self.value is None:
            return None
        return self.value <= self.asked if self.at_most else self.value >= self.asked


TARGETS = (
    Target("Judge on real held-out renders: objects right", "judge", "object_right", 0.97),
    Target("Reconstruction of validation images, PSNR", "reconstruction", "psnr_db", 22.0, "dB"),
    Target("Text-to-image, held-out captions: objects right", "t2i", "object_right", 0.80),
    Target("Text-to-image, held-out captions: background right", "t2i", "background_right", 0.90),
    Target("Editing: the asked change is there", "edit", "change_done", 0.70),
    Target("Editing: PSNR to the source outside the change", "edit", "psnr_outside_db", 20.0, "dB"),
)
MAX_MINUTES = 25.0


def outcomes(report: ReportInput) -> list[Outcome]:
    """Every target in order, then the total time."""
    found = [_outcome(target, report) for target in TARGETS]
    minutes = sum(seconds for _, seconds in report.durations) / 60 if report.durations else None
    time = Outcome(
        "Everything together, installation apart", minutes, None, None, 1, MAX_MINUTES, "min", True
    )
    return [*found, time]


def _outcome(target: Target, report: ReportInput) -> Outcome:
    evaluation = report.evaluations.get(target.evaluation)
    estimate: dict[str, Any] = evaluation.scores["scores"].get(target.metric, {}) if evaluation else {}
    return Outcome(
        label=target.label,
        value=estimate.get("mean"),
        low=estimate.get("low"),
        high=estimate.get("high"),
        n=estimate.get("n", 0),
        asked=target.at_least,
        unit=target.unit,
    )
