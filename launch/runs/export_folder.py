"""Writes the folder of launch/export.py: a run's weights, and what they need to draw with."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

from base import files, hub
from base.config import UserError, resolve, to_dict
from data.samples.text import MODEL_NAME, load_text_tokenizer
from data.shards import ShardDataset
from engine import checkpoint_export
from engine.checkpoint_folder import CHECKPOINTS, EXPORT
from generator.class_conditional.model import load_generator
from generator.config import AUTOENCODER, GENERATOR, SAMPLING, TEXT_TOKENIZER
from generator.model_card import Card, model_card
from generator.pretrained import WEIGHTS, load_pretrained
from launch.runs import entry
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun
from launch.runs.drawable import autoencoder_of
from launch.runs.tasks import read_run
from launch.runs.training import objective_of
from tokenizer.autoencoders import load_autoencoder


def write(arguments: argparse.Namespace, out: Path) -> str:
    """Writes `out` and describes it. Raises UserError: parts are missing or do not fit."""
    run_dir: Path = arguments.run
    run = run_of(run_dir, arguments.task)
    with files.directory(out) as temporary:
        if isinstance(run, TokenizerRun):
            step = _weights(arguments, run, temporary)
            load_autoencoder(temporary)
            return f"autoencoder of stage {run.stage.stage}{step and f' at step {step}'}"
        autoencoder = autoencoder_of(run, run_dir)
        (temporary / GENERATOR).mkdir()
        step = _weights(arguments, run, temporary / GENERATOR)
        (temporary / AUTOENCODER).mkdir()
        _copy(Path(autoencoder), WEIGHTS, temporary / AUTOENCODER)
        files.write_json(temporary / SAMPLING, to_dict(run.sampling))
        if isinstance(run, ClassRun):
            load_autoencoder(temporary / AUTOENCODER)
            load_generator(temporary / GENERATOR)
        else:
            copy_text_tokenizer(run.text_tokenizer, temporary / TEXT_TOKENIZER)
            pipeline, defaults = load_pretrained(temporary)
            card = _card(arguments, run, run_dir, step)
            files.write_text(temporary / "README.md", model_card(card, pipeline.generator, defaults))
    return f"{run.task}{step and f' at step {step}'}"


def _weights(arguments: argparse.Namespace, run: Run, folder: Path) -> str:
    """Writes the run's export, or its checkpoint's, into `folder`. Returns the checkpoint's step, or ''."""
    run_dir: Path = arguments.run
    if arguments.checkpoint is None:
        _copy(run_dir / EXPORT, WEIGHTS, folder)
        return ""
    directory, state = checkpoint_export.find(run_dir / CHECKPOINTS, arguments.checkpoint)
    objective = objective_of(run)
    decays = run.engine.ema_decays
    checkpoint_export.load(directory, state, objective.model, decays[0] if decays else None)
    if run.engine.precision == "bf16":  # the training keeps and exports its weights in bf16
        objective.model.bfloat16()
    objective.export(folder)
    return str(state["step"])


def _card(arguments: argparse.Namespace, run: GeneratorRun, run_dir: Path, step: str) -> Card:
    metrics = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if step:
        lines = [line for line in lines if line["step"] <= int(step)]
    return Card(
        name=arguments.name or f"OWNER/{run_dir.resolve().name}",
        task=run.task,
        license=arguments.license,
        data=[_describe_set(part.shards, run) for part in run.data.sets.values()],
        optimizer={**to_dict(run.engine.optimizer), "ema_decay": run.engine.ema_decay},
        steps=int(step) if step else lines[-1]["step"] if lines else run.engine.steps,
        metrics=lines,
        started_from=run.flow.init_from and _without_machine(run.flow.init_from),
        commit=_commit(),
        time_shift=run.flow.time_shift,
    )


def run_of(run_dir: Path, given: str | None) -> Run:
    """The config of a run. `given`: the task of an older run, whose config.json names none.

    Raises UserError: `given` is another task than the recorded one, or none is known.
    """
    config = str(run_dir / "config.json")
    recorded = resolve(config).get("task")
    if recorded is not None and given not in (None, recorded):
        raise UserError(f"--task {given}: {run_dir} was trained for {recorded}; leave --task out")
    if recorded is None and given is None:
        choices = " or ".join(f"--task {task}" for task in ("t2i", "edit", "class", "tokenizer"))
        raise UserError(f"{config} does not say what was trained; give {choices}")
    return read_run(config, [] if given is None else [f"task={given}"])


def _without_machine(path: str) -> str:
    """A path without the folders that identify this machine, because a model card is public."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def _describe_set(shards: str, run: GeneratorRun) -> str:
    try:
        manifest = ShardDataset.open(shards, run.data.storage).manifest
    except UserError:  # the data may be gone; the card is written anyway
        return f"{Path(shards).name} (not at hand when this was written)"
    source = f"{manifest.source}, " if manifest.source else ""
    return (
        f"{Path(shards).name} ({source}{manifest.num_samples:,} samples, fingerprint {manifest.fingerprint})"
    )


def _copy(source: Path, names: tuple[str, ...], target: Path) -> None:
    for name in names:
        if not (source / name).is_file():
            raise UserError(f"{source / name}: no such file; export that part again")
        shutil.copyfile(source / name, target / name)


def copy_text_tokenizer(name_or_folder: str, target: Path) -> None:
    """Copies a text tokenizer: ours file by file, transformers' as transformers saves it. Raises UserError."""
    if (Path(name_or_folder) / MODEL_NAME).is_file():
        target.mkdir()
        _copy(Path(name_or_folder), (MODEL_NAME, "config.json"), target)
        return
    load_text_tokenizer(name_or_folder)  # raises its one-line error if there is none
    from transformers import AutoTokenizer  # imported here because it takes seconds

    hub.from_pretrained(AutoTokenizer, name_or_folder).save_pretrained(target)


def _commit() -> str | None:
    """The git commit of this code; None outside a git checkout."""
    command = ["git", "-C", str(entry.REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603  # git's own name
    except (OSError, subprocess.CalledProcessError):
        return None
