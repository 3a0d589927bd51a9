"""Prints the table of docs/recipes.md, a line for each config: python -m launch.recipes configs/generator

Memory and time are estimates (launch/sizing/estimate.py) for the number of GPUs in a config's name, else for at most 8.
"""

import argparse
import sys
from pathlib import Path

from base.config import UserError
from base.terminal import say
from launch.runs import entry
from launch.runs.configs import GeneratorRun
from launch.sizing.run_kinds import read_run

CLASS = "class"
"""The folder of class-conditional configs, which have no text tokens."""
TITLES = (
    "config", "latents", "time shift", "parameters, M", "packs x tokens", "targets a step", "TFLOP a step",
    "GPUs", "GiB each", "computing + exchange, ms", "run, h",
)  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of generator configs")
    arguments = parser.parse_args()
    entry.use_torch()
    say(table(arguments.folder))


def table(folder: Path) -> str:
    """The table of the configs in `folder`, in Markdown. Raises UserError: the folder has no configs."""
    paths = sorted(path for path in folder.rglob("*.yaml") if CLASS not in path.relative_to(folder).parts)
    if not paths:
        raise UserError(f"{folder}: holds no .yaml files; give a folder of generator configs")
    names = [str(path.relative_to(folder).with_suffix("")) for path in paths]
    lines = [TITLES, ("---",) * len(TITLES), *map(_row, names, paths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, path: Path) -> tuple[str, ...]:
    from generator.flow import resolve_shift
    from launch.sizing.estimate import LATENT_SHAPES, PAPER_LATENTS, generator_plan
    from launch.sizing.step_time import NODE_GPUS

    task, run = read_run(str(path))
    if not isinstance(run, GeneratorRun):
        raise UserError(f"{path}: no generator's config; give a folder of those alone")
    shape = LATENT_SHAPES.get(run.autoencoder or "", PAPER_LATENTS)
    plan = generator_plan(run, shape, is_edit=task == "edit")
    number = path.stem.rpartition("_")[2]
    gpus = int(number) if number.isdigit() else min(NODE_GPUS, run.data.num_streams)
    return (
        name,
        "x".join(map(str, shape)),
        f"{resolve_shift(run.flow.time_shift, shape):.2f}",
        f"{plan.num_parameters / 1e6:,.0f}",
        f"{run.data.num_streams} x {run.packing.tokens_per_pack:,}",
        f"{plan.num_images:,}",
        f"{plan.step_flops / 1e12:,.0f}",
        str(gpus),
        f"{plan.memory_gib(gpus):.1f}",
        f"{1000 * plan.compute_s(gpus):,.0f} + {1000 * plan.exchange_s(gpus):,.0f}",
        f"{plan.hours(gpus):,.1f}",
    )


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
