"""A small LightningDiT on RPiAE, RAE and VAE latents of emoji: quickstart/class_chain.py (make quickstart-class).

The quickstart's own steps are the base (done ones are skipped). Running it again continues.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from base.bounds import Count
from base.config import to_dict
from launch.runs import entry
from quickstart import ablation, chain
from quickstart.config import ClassScoresConfig
from quickstart.steps import Step, deepspeed, identity_of, python

CONFIGS = "configs/quickstart_class"
LAST_OF_BASE = "judge"


@dataclass(frozen=True)
class QuickstartClassRun:
    """Settings of the chain that no step's config holds."""

    root: str = "runs/quickstart_class"
    """Folder of all results, beside the quickstart's folder."""
    num_ranks: Count = 2
    """Number of processes of each training."""
    scores: ClassScoresConfig = field(default_factory=ClassScoresConfig)
    """What is drawn and judged at the end, and how much."""
    out: str = "docs/results/class.md"
    """The page to write."""


def main() -> None:
    """Runs the quickstart up to its judge, two more tokenizers, and for each its latents, a training and scores."""
    about = __doc__ or ""
    chain.run_further(about, QuickstartClassRun, f"{CONFIGS}/run.yaml", LAST_OF_BASE, build_steps)


def build_steps(run: QuickstartClassRun, root: Path, base: Path) -> list[Step]:
    """The steps in order."""
    from quickstart.class_page import LABELS

    trained_on = identity_of(base, LAST_OF_BASE)

    def on_ranks(name: str, about: str, script: str, config: str, *options: str) -> Step:
        command = deepspeed(run.num_ranks, f"{script}.py", "--config", config, *options)
        return Step(name, about, command, (config,), trained_on)

    data = f"{CONFIGS}/data.yaml"
    features = f"{ablation.CONFIGS}/features.yaml"
    make = python("quickstart/make_data.py", "--config", data, "--out", f"{root}/data")
    steps = [
        Step("data", "compose labelled emoji scenes", make, (data,)),
        on_ranks(
            "features",
            "the network of the feature distance",
            "quickstart/train_standin",
            features,
            f"run_dir={root}/features",
        ),
    ]
    for name in ("rae", "vae"):
        about, config = f"the {LABELS[name]}", f"{CONFIGS}/{name}_tokenizer.yaml"
        steps.append(on_ranks(f"{name}_tokenizer", about, "launch/train_tokenizer", config))
    for name, label in LABELS.items():
        latents, config = f"{CONFIGS}/latents_{name}.yaml", f"{CONFIGS}/{name}.yaml"
        steps.append(
            on_ranks(f"latents_{name}", f"encode with the {label}", "launch/encode_latents", latents)
        )
        steps.append(on_ranks(name, f"train on the {label}'s latents", "launch/train_class", config))

    def score() -> None:
        from quickstart import class_scores

        class_scores.score(root, base, run.scores, Path(run.out))

    about = "draw, judge and compare"
    return [*steps, Step("scores", about, score, settings=[to_dict(run.scores), run.out])]


if __name__ == "__main__":
    sys.exit(entry.run(main))
