"""The paper's Tables 2 and 5 in miniature: quickstart/ablation.py (make ablation). Running it again continues.

The quickstart's own steps are the base (done ones are skipped); each variant is one more stage in runs/ablation.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from base.bounds import Count
from base.config import to_dict
from launch.runs import entry
from quickstart import chain
from quickstart.config import AblationScoresConfig
from quickstart.steps import Step, deepspeed, identity_of

CONFIGS = "configs/ablation"
LAST_OF_BASE = "decoder"
VARIANTS = {
    "frozen": "stage I with a frozen encoder",
    "no_pivot": "stage I without pivot loss",
    "weight_100": "stage I with w_piv = 1",
    "normalised": "stage I with Norm-L2",
    "fixed_weight": "stage I with lambda_piv = 1",
    "joint": "a single stage",
}


@dataclass(frozen=True)
class AblationRun:
    """Settings of the ablation that no step's config holds."""

    root: str = "runs/ablation"
    """Folder of the variants, beside the quickstart's folder."""
    num_ranks: Count = 2
    """Number of processes of each training."""
    scores: AblationScoresConfig = field(default_factory=AblationScoresConfig)
    """Size of the comparison between variants."""
    out: str = "docs/results/ablation.md"
    """The page to write."""


def main() -> None:
    """Trains what is missing, scores every variant, writes the page."""
    chain.run_further(__doc__ or "", AblationRun, f"{CONFIGS}/run.yaml", LAST_OF_BASE, build_steps)


def build_steps(run: AblationRun, root: Path, base: Path) -> list[Step]:
    """The steps: every variant in order, then the scores."""

    trained_on = identity_of(base, LAST_OF_BASE)

    def training(name: str, about: str, script: str = "launch/train_tokenizer.py") -> Step:
        config = f"{CONFIGS}/{name}.yaml"
        command = [script, "--config", config, f"run_dir={root}/{name}"]
        return Step(name, about, deepspeed(run.num_ranks, *command), (config,), trained_on)

    def score() -> None:
        from quickstart import ablation_scores

        ablation_scores.score(root, base, run.scores, Path(run.out))

    return [
        training("features", "the network of the feature distance", "quickstart/train_standin.py"),
        *(training(name, about) for name, about in VARIANTS.items()),
        Step("scores", "score every variant", score, settings=[to_dict(run.scores), run.out]),
    ]


if __name__ == "__main__":
    sys.exit(entry.run(main))
