"""Finds what sample.py, sample_class.py and evaluate.py draw with, in a finished run's folder or an export's."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from base.config import UserError, from_dict
from base.files import read_object
from engine import checkpoint_folder
from engine.checkpoint_folder import CHECKPOINTS, EXPORT
from generator.class_conditional.config import ClassSamplingConfig
from generator.config import AUTOENCODER, GENERATOR, SAMPLING, TEXT_TOKENIZER
from generator.sampling_config import SamplingConfig
from launch.runs.configs import ClassRun, GeneratorRun

RunT = TypeVar("RunT", GeneratorRun, ClassRun)
TRAININGS = {GeneratorRun: "t2i or edit", ClassRun: "class-conditional"}


def prompt_models(folder: Path) -> tuple[tuple[Path, str, str], SamplingConfig]:
    """(generator, autoencoder, text tokenizer) of text-to-image or editing, and their sampling.

    Raises UserError: the run is not finished, names no autoencoder, or is class-conditional.
    """
    if (folder / SAMPLING).is_file():
        if not (folder / TEXT_TOKENIZER).is_dir():
            raise UserError(f"{folder}: draws classes, not prompts; give it to launch/sample_class.py")
        return _exported(folder, SamplingConfig)
    run, autoencoder = finished_run(folder, GeneratorRun)
    return (folder / EXPORT, autoencoder, run.text_tokenizer), run.sampling


def check_edits(folder: Path) -> None:
    """Raises UserError: the run in `folder` was trained for text-to-image, so its model has never seen a source."""
    config = folder / "config.json"
    if config.is_file() and read_object(config).get("task") == "t2i":
        raise UserError(
            f"{folder}: a text-to-image training, which has never seen a source image; give --run of an editing "
            "training (launch/train_edit.py), or draw with --prompt"
        )


def class_models(folder: Path) -> tuple[tuple[Path, str], ClassSamplingConfig]:
    """(generator, autoencoder) of class-conditional generation, and their sampling. Raises UserError: as above."""
    if (folder / SAMPLING).is_file():
        if (folder / TEXT_TOKENIZER).is_dir():
            raise UserError(f"{folder}: draws prompts, not classes; give it to launch/sample.py")
        (generator, autoencoder, _), sampling = _exported(folder, ClassSamplingConfig)
        return (generator, autoencoder), sampling
    run, autoencoder = finished_run(folder, ClassRun)
    return (folder / EXPORT, autoencoder), run.sampling


SamplingT = TypeVar("SamplingT", SamplingConfig, ClassSamplingConfig)


def _exported(folder: Path, cls: type[SamplingT]) -> tuple[tuple[Path, str, str], SamplingT]:
    sampling = from_dict(cls, read_object(folder / SAMPLING), where=str(folder / SAMPLING))
    return (folder / GENERATOR, str(folder / AUTOENCODER), str(folder / TEXT_TOKENIZER)), sampling


def finished_run(run_dir: Path, cls: type[RunT]) -> tuple[RunT, str]:
    """The config of a finished run, and its autoencoder. Raises UserError: not finished, or no autoencoder."""
    check_finished(run_dir, TRAININGS[cls])
    where = run_dir / "config.json"
    run = from_dict(cls, read_object(where), where=str(where))
    return run, autoencoder_of(run, run_dir)


def autoencoder_of(run: GeneratorRun | ClassRun, run_dir: Path) -> str:
    """The folder of the run's autoencoder. Raises UserError: the run names none."""
    if run.autoencoder is None:
        raise UserError(f"{run_dir}/config.json: names no autoencoder; set 'autoencoder' in the run's config")
    return run.autoencoder


def check_finished(run_dir: Path, training: str) -> None:
    """Raises UserError: `run_dir` holds no finished run. For a stopped run, names the command that exports it."""
    if (run_dir / EXPORT).is_dir():
        return
    if checkpoints := checkpoint_folder.all_in(run_dir / CHECKPOINTS):
        raise UserError(
            f"{run_dir}: no {EXPORT} folder, for this training is not finished; its newest checkpoint is of step "
            f"{checkpoint_folder.step_of(checkpoints[-1])}: `python launch/export.py --run {run_dir} --checkpoint "
            "latest --out FOLDER` writes a folder that --run takes, too"
        )
    raise UserError(f"{run_dir}: no {EXPORT} folder; give the run_dir of a finished {training} training")
