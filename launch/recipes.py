"""Prints the table of docs/recipes.md, a line for each run: python -m launch.recipes configs/generator

Memory and time are estimates (launch/sizing/estimate.py) for the number of GPUs in a config's name, else for at most 8
and, of the main runs, also for a GPU a pack.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.config import UserError, resolve
from base.terminal import say
from launch.runs import entry
from launch.runs.configs import GeneratorRun
from launch.runs.tasks import read_run

LATENTS, HEAD = "latents", Path("parts", "ddt.yaml")
"""The folder of runs on other latents, and the part that adds a head to each of them."""
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
    """The table of the runs in `folder`, in Markdown. Raises UserError: the folder has no configs of these tasks."""
    rows = list(_rows(folder))
    if not rows:
        raise UserError(f"{folder}: holds no config of task t2i or edit; give a folder of generator configs")
    return "\n".join(f"| {' | '.join(line)} |" for line in [TITLES, ("---",) * len(TITLES), *rows])


def _rows(folder: Path) -> Iterator[tuple[str, ...]]:
    """A row for each run and number of GPUs."""
    from launch.sizing.step_time import NODE_GPUS

    for path in sorted(folder.rglob("*.yaml")):
        if resolve(path).get("task") not in ("t2i", "edit"):  # a part, or a class-conditional run
            continue
        name = str(path.relative_to(folder).with_suffix(""))
        run = _read([path])
        number, most = path.stem.rpartition("_")[2], run.data.num_streams
        if number.isdigit():
            yield _row(name, run, int(number))
            continue
        node = min(NODE_GPUS, most)
        if path.parent.name == LATENTS:
            yield _row(name, run, node)
            yield _row(f"{name} + {HEAD.stem}", _read([path, folder / HEAD]), node)
        else:
            yield from (_row(name, run, gpus) for gpus in sorted({node, most}))


def _read(paths: Sequence[Path]) -> GeneratorRun:
    run = read_run(paths)
    assert isinstance(run, GeneratorRun)
    return run


def _row(name: str, run: GeneratorRun, gpus: int) -> tuple[str, ...]:
    from generator.flow import resolve_shift
    from launch.sizing.estimate import LATENT_SHAPES, PAPER_LATENTS, generator_plan

    shape = LATENT_SHAPES.get(run.autoencoder or "", PAPER_LATENTS)
    plan = generator_plan(run, shape)
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
