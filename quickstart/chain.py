"""The whole pipeline on one small machine: quickstart/chain.py (make quickstart). Running it again continues."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from base import files
from base.bounds import Count
from base.config import UserError, load
from base.terminal import say
from launch.runs import entry
from quickstart import chain_folder
from quickstart.config import ChainScoresConfig
from quickstart.steps import Step, deepspeed, python, run_steps

COMMAND = "quickstart"
PAGE_SIGN = "Written by `make "
"""Beginning of the signature in the pages of further chains."""
CONFIGS = "configs/quickstart"


@dataclass(frozen=True)
class QuickstartRun:
    """Settings of the quickstart that no step's config holds."""

    root: str = "runs/quickstart"
    """Folder of all results. The configs beside this one write below it."""
    num_ranks: Count = 2
    """Number of processes of each training."""
    num_text_tokens: Count = 512
    """Vocabulary of the text tokenizer."""
    scores: ChainScoresConfig = field(default_factory=ChainScoresConfig)
    """What is sampled and judged at the end, and how much."""


def main() -> None:
    """Runs the chain: data -> tokenizer -> latents -> text-to-image -> editing -> report."""
    parser = entry.config_parser(__doc__ or "", f"{CONFIGS}/run.yaml")
    parser.add_argument("--fresh", action="store_true", help="remove what is there and start over")
    arguments = parser.parse_args()
    run = entry.read_config(QuickstartRun, arguments)
    if arguments.dry_run:
        entry.print_config(run)
        return
    entry.use_torch()
    from quickstart.chain_scores import NOTES
    from report.page import render_report

    root = Path(run.root)
    steps = build_steps(run, root)
    if arguments.fresh:
        chain_folder.remove(root, COMMAND, [step.name for step in steps])
    chain_folder.claim(root, COMMAND)
    files.write_json(root / "notes.json", NOTES)
    try:
        run_steps(root, steps)
    finally:
        say(f"report: {render_report(root)}")


def build_steps(run: QuickstartRun, root: Path) -> list[Step]:
    """The steps in order, each with the command that a person would type."""

    def score() -> None:
        from quickstart import chain_scores

        chain_scores.score(root, run.scores)

    def training(name: str, about: str) -> Step:
        script = name if name in ("standin", "judge", "t2i", "edit") else "tokenizer"
        config = f"{CONFIGS}/{name}.yaml"
        folder = "quickstart" if name in ("standin", "judge") else "launch"
        command = deepspeed(run.num_ranks, f"{folder}/train_{script}.py", "--config", config)
        return Step(name, about, command, (config,))

    latents = f"{CONFIGS}/latents.yaml"
    encode = deepspeed(run.num_ranks, "launch/encode_latents.py", "--config", latents)
    data = python("quickstart/make_data.py", "--config", f"{CONFIGS}/data.yaml", "--out", f"{root}/data")
    text = python(
        "launch/train_text_tokenizer.py",
        *("--shards", f"{root}/data/scenes-train", f"{root}/data/edits-train", "--samples", "4000"),
        *("--vocab-size", str(run.num_text_tokens), "--out", f"{root}/text_tokenizer"),
    )
    return [
        Step("data", "compose emoji scenes and edits, write shards", data, (f"{CONFIGS}/data.yaml",)),
        Step("text", "train the text tokenizer on the captions", text),
        training("standin", "train a small ViT on emoji identity; it stands in for DINOv2"),
        training("pivot", "stage I: encoder and decoder, pivoted on the frozen replica"),
        training("bridge", "stage II: the Variational Bridge"),
        training("decoder", "stage III: the decoder on frozen latents"),
        Step("latents", "encode scenes and edits", encode, (latents,)),
        training("judge", "train the judge on real renders"),
        training("t2i", "train text-to-image on the latents"),
        training("edit", "fine-tune for editing"),
        Step("scores", "reconstruct, draw, edit and judge", score),
    ]


class FurtherRun(Protocol):
    """The config of a further chain, which builds on the quickstart's results."""

    @property
    def root(self) -> str:
        """Folder of the chain's results."""

    @property
    def out(self) -> str:
        """The page that the chain writes."""


RunT = TypeVar("RunT", bound=FurtherRun)


def run_further(
    about: str, cls: type[RunT], config: str, last: str, build: Callable[[RunT, Path, Path], list[Step]]
) -> None:
    """The command of a further chain: the quickstart up to the step `last`, then the steps that `build` gives.

    `config`: the YAML file of its `cls`. `build`: (run, its root, the quickstart's root) -> steps.
    """
    parser = entry.config_parser(about, config)
    parser.add_argument("--fresh", action="store_true", help="remove what is there, but for the quickstart's")
    arguments = parser.parse_args()
    run = entry.read_config(cls, arguments)
    if arguments.dry_run:
        entry.print_config(run)
        return
    entry.use_torch()
    base = load(QuickstartRun, f"{CONFIGS}/run.yaml")
    base_root, root = Path(base.root), Path(run.root)
    command, here, there = Path(config).parent.name, root.resolve(), base_root.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UserError(
            f"root {root}: the quickstart's results are in {base_root}; give a folder apart from it"
        )
    files.check_signed(run.out, PAGE_SIGN)
    chain_folder.check(base_root, COMMAND)
    if arguments.fresh:
        chain_folder.check_removable(root, command)
    else:
        chain_folder.claim(root, command)
    steps = build_steps(base, base_root)
    run_steps(base_root, steps[: [step.name for step in steps].index(last) + 1])
    steps = build(run, root, base_root)
    if arguments.fresh:
        chain_folder.remove(root, command, [step.name for step in steps])
        chain_folder.claim(root, command)
    run_steps(root, steps)
    say(f"results: {run.out}")


if __name__ == "__main__":
    sys.exit(entry.run(main))
