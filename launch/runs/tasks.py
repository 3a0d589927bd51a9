"""The tasks of a training, which its config names (`task:`): the config's class, and the body of launch/train_*.py."""

from __future__ import annotations

from collections.abc import Sequence

from base.config import Paths, UserError, from_dict, names_of, resolve
from base.terminal import say
from launch.runs import entry
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun

RUNS: dict[str, type[Run]] = {
    "tokenizer": TokenizerRun,
    "t2i": GeneratorRun,
    "edit": GeneratorRun,
    "class": ClassRun,
}
"""The class of a task's config. launch/train_TASK.py trains it."""


def read_run(paths: Paths, overrides: Sequence[str] = ()) -> Run:
    """The config of a training of any task. Raises UserError: `task` is missing or unknown; as `base.config.load`."""
    tree, where = resolve(paths, overrides), names_of(paths)
    task = tree.get("task")
    if not isinstance(task, str) or task not in RUNS:
        found = "there is no 'task'" if task is None else f"task is {task!r:.50}"
        raise UserError(
            f"{where}: {found}; a training's config has a line `task: ...`, one of {', '.join(RUNS)}"
        )
    return from_dict(RUNS[task], tree, where=where)


def main(task: str, about: str, default: str) -> None:
    """The command that trains `task`; `default`: its config without --config. Raises UserError: as `read_run`, or the
    config is of another task.
    """
    arguments = entry.config_parser(about, default).parse_args()
    paths, overrides = entry.config_words(arguments)
    run = read_run(paths, overrides)
    if run.task != task:
        raise UserError(
            f"{names_of(paths)}: task is {run.task}: start this config with launch/train_{run.task}.py"
        )
    entry.use_torch()
    if arguments.dry_run:
        from launch.sizing.dry_run import report

        say(report(run))
    else:
        from launch.runs.training import train

        train(run)
