"""A finished run -> a folder for the hub: python launch/export.py --run RUN --name OWNER/NAME --out DIR

Generator, autoencoder, text tokenizer, sampling defaults and a model card. Nothing is uploaded: the command that would
is printed.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

from data.shards import ShardDataset
from data.text import MODEL_NAME, load_text_tokenizer
from engine import files, hub
from engine.config import UserError, from_dict, to_dict
from engine.loop import EXPORT
from generator.model_card import Card, Task, model_card
from generator.pretrained import AUTOENCODER, GENERATOR, SAMPLING, TEXT_TOKENIZER, WEIGHTS, load_pretrained
from launch import entry
from launch.runs import GeneratorRun

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def main() -> None:
    """Writes the folder, whole or not at all, after it has been read back."""
    parser = entry.parser(__doc__ or "")
    parser.add_argument("--run", type=Path, required=True, help="run_dir of a finished training")
    parser.add_argument(
        "--task", choices=get_args(Task), help="what it was trained for, if its folder does not say"
    )
    parser.add_argument("--name", required=True, help="OWNER/NAME it will have on the hub")
    parser.add_argument("--license", default="other", help="the hub's identifier (default: other)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not NAME.fullmatch(arguments.name):
        raise UserError(f"--name '{arguments.name}': give OWNER/NAME of letters, digits, '.', '_' and '-'")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; remove it or give another --out")
    write(arguments, out)
    print(f"{out}: read back and complete; to upload it:\nhf upload {arguments.name} {out}")


def write(arguments: argparse.Namespace, out: Path) -> None:
    """Raises UserError: the run is not finished, or its parts are gone or do not belong together."""
    run_dir: Path = arguments.run
    if not (run_dir / EXPORT).is_dir():
        raise UserError(f"{run_dir}: no {EXPORT} folder; give the run_dir of a finished t2i or edit training")
    run = from_dict(GeneratorRun, files.read_json(run_dir / "config.json"), where=f"{run_dir}/config.json")
    if run.autoencoder is None:
        raise UserError(f"{run_dir}/config.json: names no autoencoder; set 'autoencoder' in the run's config")
    task = task_of(run, arguments.task, run_dir)
    with files.directory(out) as temporary:
        for source, part in ((run_dir / EXPORT, GENERATOR), (Path(run.autoencoder), AUTOENCODER)):
            _copy(source, WEIGHTS, temporary / part)
        copy_text_tokenizer(run.text_tokenizer, temporary / TEXT_TOKENIZER)
        files.write_json(temporary / SAMPLING, to_dict(run.sampling))
        pipeline, defaults = load_pretrained(temporary)
        card = _card(arguments, task, run, run_dir)
        files.write_text(temporary / "README.md", model_card(card, pipeline.generator, defaults))


def _card(arguments: argparse.Namespace, task: Task, run: GeneratorRun, run_dir: Path) -> Card:
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return Card(
        name=arguments.name,
        task=task,
        license=arguments.license,
        data=[_describe_set(part.shards, run) for part in run.data.sets.values()],
        optimizer={**to_dict(run.engine.optimizer), "ema_decay": run.engine.ema_decay},
        steps=lines[-1]["step"] if lines else run.engine.steps,
        metrics=lines,
        started_from=run.flow.init_from and _without_machine(run.flow.init_from),
        commit=_commit(),
        time_shift=run.flow.time_shift,
    )


def task_of(run: GeneratorRun, given: Task | None, run_dir: Path) -> Task:
    """What the run was trained for. Raises UserError: `given` is something else, or nobody says it."""
    if run.task is not None and given not in (None, run.task):
        raise UserError(f"--task {given}: {run_dir} was trained for {run.task}; leave --task out")
    if (task := run.task or given) is None:
        raise UserError(
            f"{run_dir}/config.json does not say what was trained; give --task t2i or --task edit"
        )
    return task


def _without_machine(path: str) -> str:
    """The end of an absolute path: a card is public."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _describe_set(shards: str, run: GeneratorRun) -> str:
    try:
        manifest = ShardDataset.open(shards, run.data.storage).manifest
    except UserError:  # a card can be written where the data is no more
        return f"{Path(shards).name} (not at hand when this was written)"
    source = f"{manifest.source}, " if manifest.source else ""
    return (
        f"{Path(shards).name} ({source}{manifest.num_samples:,} samples, fingerprint {manifest.fingerprint})"
    )


def _copy(source: Path, names: tuple[str, ...], target: Path) -> None:
    target.mkdir()
    for name in names:
        if not (source / name).is_file():
            raise UserError(f"{source / name}: no such file; export that part again")
        shutil.copyfile(source / name, target / name)


def copy_text_tokenizer(name_or_folder: str, target: Path) -> None:
    """Ours as it is; one that transformers knows by this name or in this folder as it saves it. Raises UserError."""
    if (Path(name_or_folder) / MODEL_NAME).is_file():
        _copy(Path(name_or_folder), (MODEL_NAME, "config.json"), target)
        return
    load_text_tokenizer(name_or_folder)  # its one-line error, should there be none
    from transformers import AutoTokenizer  # takes seconds to import: only where it is needed

    hub.offline_if_unreachable()
    AutoTokenizer.from_pretrained(name_or_folder).save_pretrained(target)


def _commit() -> str | None:
    """Of this code; None outside a git checkout."""
    command = ["git", "-C", str(entry.REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
