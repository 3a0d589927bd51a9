"""The ablation's page: the scores of each variant, and which of the paper's trends appear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.metrics.interval import Estimate
from quickstart.score_order import OVERLAP_TEXT, SAME_TEXT, has_less, has_more

LABELS = {
    "pivot": "stage I: raw L2, adaptive, w_piv 0.25",
    "bridge": "stages I + II",
    "decoder": "stages I + II + III",
    "frozen": "stage I, encoder frozen",
    "no_pivot": "stage I, encoder trained without pivot loss",
    "weight_100": "stage I, w_piv 1",
    "normalised": "stage I, Norm-L2",
    "fixed_weight": "stage I, lambda_piv = 1 (not adaptive)",
    "joint": "single stage",
}


@dataclass(frozen=True)
class Row:
    """One variant with its scores."""

    name: str
    psnr_db: float
    ssim: float
    feature_distance: float
    probe: Estimate

    def text(self) -> str:
        """One line for the console."""
        return (
            f"{self.name}: PSNR {self.psnr_db:.2f} dB, SSIM {self.ssim:.3f}, feature distance "
            f"{self.feature_distance:.3f}, probe {self.probe.mean:.3f}"
        )


@dataclass(frozen=True)
class Trend:
    """A trend of the paper: `better` has a better `metric` than `worse`."""

    claim: str
    metric: str  # "distance" (less is better) or "probe" (more is better)
    better: str
    worse: str
    paper: str


TRENDS = (
    Trend(
        "the pivot loss keeps what a linear probe reads",
        "probe",
        "pivot",
        "no_pivot",
        "top-1 84.56 -> 84.18 with it",
    ),
    Trend(
        "raw L2 holds the encoder better than Norm-L2",
        "probe",
        "pivot",
        "normalised",
        "gFID 3.93 against 9.85",
    ),
    Trend("Norm-L2 reconstructs better", "distance", "normalised", "pivot", "rFID 0.16 against 0.53"),
    Trend(
        "the adaptive weight reconstructs better than a fixed one",
        "distance",
        "pivot",
        "fixed_weight",
        "rFID 0.53 against 0.68",
    ),
    Trend(
        "training the encoder reconstructs better than a frozen one",
        "distance",
        "weight_100",
        "frozen",
        "rFID 0.50 against 0.62",
    ),
    Trend(
        "a smaller pivot weight reconstructs better",
        "distance",
        "pivot",
        "weight_100",
        "rFID 0.22 against 0.50 (0.25, 1)",
    ),
    Trend("stage II costs reconstruction", "distance", "pivot", "bridge", "rFID 0.47 against 1.57"),
    Trend("stage III wins it back", "distance", "decoder", "bridge", "rFID 0.50 against 1.57"),
    Trend(
        "three stages reconstruct better than one", "distance", "decoder", "joint", "rFID 0.50 against 0.64"
    ),
)


def page(rows: Sequence[Row], machine: str, *, num_images: int, num_probe: int, num_classes: int) -> str:
    """The page as Markdown. A missing variant leaves out the trends that need it."""
    known = {row.name: row for row in rows}
    lines = [
        "# Ablations in miniature",
        "",
        f"Written by `make ablation` ({machine}). Emoji scenes at 64 px, latents of 4x4, one seed, minutes of "
        "training: this shows that every variant runs, and which of the paper's trends already appear; it is no "
        f"substitute for ImageNet. {num_images} held-out scenes are reconstructed. The feature distance is "
        "Fréchet's in the features of a ViT that no tokenizer has seen (smaller is better; not FID). The probe is "
        f"the top-1 of a linear classifier of {num_classes} identities on the encoder's mean patch token, "
        f"{num_probe} test images, with its 95 % interval.",
        "",
        "| variant | PSNR dB | SSIM | feature distance | linear probe |",
        "|---|---|---|---|---|",
    ]
    for name, label in LABELS.items():
        if name in known:
            row = known[name]
            probe = f"{row.probe.mean:.3f} ({row.probe.low:.3f}-{row.probe.high:.3f})"
            lines.append(
                f"| {label} | {row.psnr_db:.2f} | {row.ssim:.3f} | {row.feature_distance:.3f} | {probe} |"
            )
    lines += ["", "| the paper's trend | paper | here | appears |", "|---|---|---|---|"]
    for trend in TRENDS:
        if trend.better in known and trend.worse in known:
            lines.append(_verdict(trend, known[trend.better], known[trend.worse]))
    return "\n".join(lines) + "\n"


def _verdict(trend: Trend, better: Row, worse: Row) -> str:
    if trend.metric == "probe":
        holds, unclear = has_more(better.probe, worse.probe), OVERLAP_TEXT
        here = f"probe {better.probe.mean:.3f} against {worse.probe.mean:.3f}"
    else:
        holds, unclear = has_less(better.feature_distance, worse.feature_distance), SAME_TEXT
        here = f"distance {better.feature_distance:.3f} against {worse.feature_distance:.3f}"
    verdict = {None: f"not distinguishable ({unclear})", True: "yes", False: "no, the reverse"}[holds]
    return f"| {trend.claim} | {trend.paper} | {here} | {verdict} |"
