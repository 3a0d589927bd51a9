"""The page of `make quickstart-class`: what each kind of latents reached by step; does the paper's order appear?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.metrics.interval import Estimate

LABELS = {"rpiae": "RPiAE", "rae": "RAE", "vae": "VAE"}
"""In the paper's order of generation, best first (Table 8, 800 epochs, without guidance: gFID 1.68, 1.87 and 2.17)."""
SAME = 0.02
"""Relative difference of distances below which two latents count as equal: they have no interval."""


@dataclass(frozen=True)
class Point:
    """One export of one training."""

    latents: str  # key of LABELS
    step: int
    distance: float
    class_right: Estimate

    def text(self) -> str:
        """One line for the console."""
        right = self.class_right
        return (
            f"{LABELS[self.latents]}, step {self.step}: feature distance {self.distance:.3f}, class right "
            f"{right.mean:.3f} ({right.low:.3f} to {right.high:.3f})"
        )


@dataclass(frozen=True)
class Reference:
    """What no drawing can be better than: the autoencoder's reconstructions of real images."""

    distance: float
    class_right: Estimate


def page(
    points: Sequence[Point],
    references: Mapping[str, Reference],
    seconds: Mapping[str, float],
    machine: str,
    *,
    num_images: int,
    num_real: int,
) -> str:
    """Markdown. `seconds`: of each latents' training."""
    steps = sorted({point.step for point in points})
    known = {(point.latents, point.step): point for point in points}
    names = [name for name in LABELS if (name, steps[-1]) in known]
    lines = [
        "# Class-conditional generation in miniature",
        "",
        f"Written by `make quickstart-class` ({machine}). Emoji scenes of one object at 64 px, 44 classes, latents of "
        "4x4; the same LightningDiT (width 128, 4 layers) for as many steps on each kind of latents: equal time, "
        "but for its first and last layer; one seed, minutes of training. It is no substitute for ImageNet. "
        f"{num_images} images are drawn (Euler, without guidance) and compared with {num_real} real ones. The feature "
        "distance is Fréchet's in the features of a ViT that no tokenizer has seen (smaller is better; not FID). "
        "*Class right*: the judge sees the asked object and nothing else; 95 % intervals. *Reconstructions* are "
        "real images through the autoencoder: no drawing of it can be much better.",
        "",
        "| latents | "
        + " | ".join(f"distance, step {step}" for step in steps)
        + " | reconstructions | training, s |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for name in names:
        values = [f"{known[name, step].distance:.2f}" for step in steps]
        row = [LABELS[name], *values, f"{references[name].distance:.2f}", f"{seconds[name]:.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "| latents | " + " | ".join(f"class right, step {step}" for step in steps) + " | reconstructions |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name in names:
        rights = [known[name, step].class_right for step in steps] + [references[name].class_right]
        values = [f"{right.mean:.3f} ({right.low:.3f}-{right.high:.3f})" for right in rights]
        lines.append(f"| {LABELS[name]} | {' | '.join(values)} |")
    last = {name: known[name, steps[-1]] for name in names}
    lines += ["", verdict(last)]
    return "\n".join(lines) + "\n"


def verdict(last: Mapping[str, Point]) -> str:
    """Whether the paper's order appears, pair by pair, at the last step."""
    names = [name for name in LABELS if name in last]
    found = []
    for place, better in enumerate(names):
        for worse in names[place + 1 :]:
            first, second = last[better].distance, last[worse].distance
            if abs(first - second) < SAME * max(first, second):
                word = f"cannot be told (less than {SAME:.0%} apart)"
            else:
                word = "appears" if first < second else "does not appear, the reverse does"
            found.append(f"{LABELS[better]} before {LABELS[worse]} {word}")
    return f"The paper's order, by distance at the last step: {'; '.join(found)}."
