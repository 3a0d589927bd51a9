"""Runs a training from its config, for every training entry point: opens the data, builds the objective, trains."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from base import files
from base.config import UserError, to_dict
from base.objective import Objective
from base.redaction import redact
from base.terminal import say
from data.config import PixelConfig
from data.packs.class_batch import ClassPacker
from data.packs.packing import EditPacker, T2IPacker
from data.plan.mixture import Mixture
from data.plan.stream import Packer, PackStream
from data.samples.images import PixelPacker
from data.samples.text import TextTokenizer, load_text_tokenizer
from data.shards import LatentInfo, ShardDataset
from engine import checkpoint_folder, distributed, logs, loop, run_lock
from engine.checkpoint_folder import CHECKPOINTS, EXPORT
from engine.determinism import make_deterministic
from engine.distributed import Ranks
from engine.job_endings import LostContactError
from generator.attention import choose_backend
from generator.class_conditional.objective import (
    ClassPreview,
    build_class_objective,
    spread_labels,
)
from generator.objective import Preview, build_objective
from generator.sampling import read_conditions
from launch.runs import input_fingerprints, nodes, periodic_scores
from launch.runs.configs import ClassRun, GeneratorRun, PixelRun, Run, TokenizerRun
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import fingerprint
from tokenizer.training.build_stage import build_stage

COMMAND = "train"
OTHER_START_S = 20.0
"""How long a starting training may take from opening its port to taking the run lock."""
RUN_FILES = (
    *(
        "config.json",
        "metrics.jsonl",
        "scores.jsonl",
        "events.jsonl",
        "samples",
        CHECKPOINTS,
        EXPORT,
        f"{EXPORT}_*",
        "evaluation",
    ),
    *("hang", "nonfinite", "spikes", run_lock.NAME),
)
"""Patterns of the file names that a training writes to its run_dir."""
PACKERS = {"t2i": T2IPacker, "edit": EditPacker}


def train(run: Run) -> None:
    """Trains what the config's task says."""
    if isinstance(run, TokenizerRun):
        preview = run.preview_shards, run.num_preview_images, run.pixels
        train_on_pixels(run, lambda: build_stage(run.stage, preview_pixels(*preview)))
    elif isinstance(run, GeneratorRun):
        train_generator(run)
    else:
        train_class(run)


def train_on_pixels(run: PixelRun, build: Callable[[], Objective]) -> None:
    """Opens the pixel shards (the cheapest step that can fail), then builds the objective and trains it."""
    _check_folder(run)
    mixture = Mixture.open(run.data.sets, run.data.storage)
    _train(run, mixture, PixelPacker(run.pixels), build())


def train_generator(run: GeneratorRun) -> None:
    """Trains text-to-image or editing."""
    _check_folder(run)
    mixture = Mixture.open(run.data.sets, run.data.storage)
    latents = _latents(mixture)
    text_tokenizer = load_text_tokenizer(run.text_tokenizer)
    packer = PACKERS[run.task](run.packing, latents, text_tokenizer, pads_attention=_runs_sdpa(run))
    objective = build_objective(
        run.task,
        run.generator,
        run.flow,
        latents,
        text_tokenizer,
        seed=run.engine.seed,
        preview=_preview(run, text_tokenizer, latents),
    )
    _train(run, mixture, packer, objective)


def train_class(run: ClassRun) -> None:
    """Trains a class-conditional generator."""
    _check_folder(run)
    mixture = Mixture.open(run.data.sets, run.data.storage)
    latents = _latents(mixture)
    packer = ClassPacker(run.packing, latents, run.generator.num_classes)
    preview = None
    if run.autoencoder is not None:
        _check_autoencoder(run.autoencoder, latents)
        labels = spread_labels(run.generator.num_classes, run.num_preview_images)
        preview = ClassPreview(labels, run.sampling, load_autoencoder(run.autoencoder).decode)
    objective = build_class_objective(run.generator, run.flow, latents, seed=run.engine.seed, preview=preview)
    _train(run, mixture, packer, objective)


def objective_of(run: Run) -> Objective:
    """A training's objective at its start, without sample grids, into which a checkpoint can be loaded.

    Raises UserError: the data or the initial weights are missing.
    """
    if isinstance(run, TokenizerRun):
        return build_stage(run.stage)
    latents = _latents(Mixture.open(run.data.sets, run.data.storage))
    if isinstance(run, ClassRun):
        return build_class_objective(run.generator, run.flow, latents, seed=run.engine.seed)
    text_tokenizer = load_text_tokenizer(run.text_tokenizer)
    return build_objective(run.task, run.generator, run.flow, latents, text_tokenizer, seed=run.engine.seed)


def preview_pixels(shards: str | None, num_images: int, pixels: PixelConfig) -> Tensor | None:
    """The first images of validation shards, uint8 [N, 3, H, W]; None without shards."""
    if shards is None:
        return None
    dataset = ShardDataset.open(shards)
    samples = dataset.read(range(min(num_images, len(dataset))))
    batch = PixelPacker(pixels).collate(samples, step=0, stream=0, epochs=[0] * len(samples), seed=0)
    return batch.pixels


def _latents(mixture: Mixture) -> LatentInfo:
    latents = mixture.members[0].dataset.manifest.latent
    if latents is None:
        raise UserError(f"{mixture.where}: holds pixels, not latents; run launch/encode_latents.py on it")
    return latents


def _preview(run: GeneratorRun, text_tokenizer: TextTokenizer, latents: LatentInfo) -> Preview | None:
    """The preview of the first validation captions (and sources); None: the run has no preview shards or autoencoder.

    Raises UserError: the autoencoder or the preview's latents do not match the training data. Without preview shards,
    the autoencoder need not exist yet.
    """
    if run.autoencoder is None:
        return None
    needed = run.preview_shards is not None or run.evaluation is not None
    if needed or Path(run.autoencoder).is_dir():
        _check_autoencoder(run.autoencoder, latents)
    if run.preview_shards is None:
        return None
    dataset = ShardDataset.open(run.preview_shards)
    found = dataset.manifest.latent
    if found is not None and found.tokenizer_fingerprint != latents.tokenizer_fingerprint:
        raise UserError(
            f"preview_shards {run.preview_shards}: encoded with another autoencoder than the training latents; encode "
            "them with the same"
        )
    conditions = tuple(read_conditions(dataset, text_tokenizer, run.num_preview_images))
    autoencoder = load_autoencoder(run.autoencoder)
    return Preview(conditions, run.sampling, autoencoder.decode)


def _check_autoencoder(autoencoder: str, latents: LatentInfo) -> None:
    """Raises UserError: the autoencoder is missing, or encoded other data than the training's."""
    if fingerprint(autoencoder) != latents.tokenizer_fingerprint:
        raise UserError(
            f"autoencoder {autoencoder}: the training latents were encoded with another one; give that one"
        )


def _runs_sdpa(run: GeneratorRun) -> bool:
    """Whether SDPA will run, so that packs need padded buckets. Raises UserError: a forced kernel cannot run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if run.engine.precision == "fp32" else torch.bfloat16
    return (
        choose_backend(device, dtype, run.flow.attention_backend, run.generator.backbone.head_dim) == "sdpa"
    )


def _check_folder(run: PixelRun | GeneratorRun | ClassRun) -> None:
    """Raises UserError: run_dir holds files that a training would replace and that no training marked as its own."""
    files.check_claim(run.run_dir, COMMAND, RUN_FILES, _is_run)


def _is_run(run_dir: Path) -> bool:
    """Whether a training of an earlier version, which left no marker, wrote to the folder."""
    for name, fields in (("config.json", {"run_dir", "engine"}), (run_lock.NAME, {"machine", "pid"})):
        try:
            if fields <= set(files.read_json(run_dir / name)):
                return True
        except (OSError, ValueError, TypeError):
            pass
    return any(run_dir.glob(f"{CHECKPOINTS}/*/{checkpoint_folder.STATE}"))


def _start_ranks(run_dir: Path) -> Ranks:
    """Joins the ranks. If the port is taken by another training in `run_dir`, the error names that training.

    Two launches of one command on a host use one port. The other training may have started a moment ago, and may not
    hold the folder's lock yet.
    """
    try:
        return distributed.start()
    except LostContactError:
        deadline_s = time.monotonic() + OTHER_START_S
        while not (reason := run_lock.refusal(run_dir)):
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
        raise UserError(reason) from None


def _train(
    run: PixelRun | GeneratorRun | ClassRun,
    mixture: Mixture,
    packer: Packer,
    objective: Objective,
) -> None:
    if os.environ.get("RANK", "0") == "0":  # only rank 0 uses wandb
        logs.check_wandb(run.engine.wandb)
    if run.engine.deterministic:
        if isinstance(run, PixelRun) and torch.cuda.is_available():
            raise UserError(
                "engine.deterministic: the gradients of max pooling and of bicubic resizing, which trainings on pixels "
                "may need, have no deterministic kernel on a GPU; set it to false"
            )
        make_deterministic()
    scores = periodic_scores.start_of(run)  # before the ranks meet: a mistake is one line, not one a rank
    ranks = _start_ranks(Path(run.run_dir))
    resolved = to_dict(run)
    nodes.check_start(
        ranks, Path(run.run_dir), resolved, input_fingerprints.facts(resolved, mixture, objective)
    )
    if ranks.is_first:
        files.claim(run.run_dir, COMMAND, RUN_FILES, _is_run)
    evaluation = None if scores is None else scores(ranks, objective)
    source = PackStream(
        mixture,
        packer,
        num_streams=run.data.num_streams,
        seed=run.data.seed,
        rank=ranks.rank,
        world=ranks.world,
        prefetch_steps=run.data.prefetch_steps,
    )
    if ranks.is_first:
        for line in objective.describe():
            say(f"[{objective.name}] {redact(line)}")
    engine = run.engine
    if run.data.max_epochs is not None:
        engine = dataclasses.replace(engine, steps=min(engine.steps, source.num_steps(run.data.max_epochs)))
        if ranks.is_first:
            line = f"{engine.steps} steps: at most data.max_epochs = {run.data.max_epochs}"
            say(f"[{objective.name}] {line}")
    loop.train(
        objective,
        source,
        engine,
        run_dir=Path(run.run_dir),
        resolved=resolved,
        ranks=ranks,
        evaluation=evaluation,
    )
    distributed.stop()
