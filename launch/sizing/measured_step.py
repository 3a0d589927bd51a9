"""launch/preflight.py --execute: measures one real step of every phase on random data, beside the estimate."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from base.config import UserError
from base.objective import Batch, BatchSource, Evaluation, Objective
from base.terminal import say
from engine import distributed
from engine.distributed import Ranks
from engine.rehearsal import Meter, OutOfMemoryError, rehearse
from generator.class_conditional.objective import ClassPreview, build_class_objective, spread_labels
from generator.model import Generator
from generator.objective import Decode, FlowObjective, Preview
from generator.sampling_config import DrawingConfig
from launch.runs import periodic_scores
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun
from launch.sizing import synthetic
from launch.sizing.estimate import GIB, INSTRUCTION_TOKENS, TEXT_TOKENS, Plan, untrained_latents
from launch.sizing.report import Preflight, remedies
from launch.sizing.stage_size import in_phases
from tokenizer.autoencoders import load_autoencoder
from tokenizer.config import CONFIG_NAME
from tokenizer.training.build_stage import build_untrained

MAX_PACKS = 2
"""Packs of a rank in a step: two packs accumulate gradients, and more packs need no more memory."""
PREVIEW_STEPS = 4  # of the solver; more steps take longer, but no more memory
Build = Callable[[], Objective]
Evaluate = Callable[[Objective], Evaluation]
Parts = tuple[Build, Callable[[int], Batch], str]
"""What builds the objective, what makes the pack of a stream, and a line about both."""
SamplingT = TypeVar("SamplingT", bound=DrawingConfig)


def execute(preflight: Preflight, *, gpu_gib: float) -> None:
    """Runs and prints the measurement, in a temporary folder beside the run's.

    Raises UserError: out of memory, or more ranks than packs.
    """
    run, plan = preflight.run, preflight.plan
    ranks = distributed.start()
    if ranks.world > run.data.num_streams:
        raise UserError(f"{ranks.world} ranks, but data.num_streams is {run.data.num_streams}; raise it")
    packs = min(MAX_PACKS, plan.packs(ranks.world))
    engine = dataclasses.replace(
        run.engine,
        steps=1 + len(plan.phases),
        log_every_steps=1,
        sample_every_steps=0,
        export_at_steps=(),
        on_alarm="warn",
        wandb="disabled",
    )
    build, pack, note = _parts(preflight)
    streams = range(ranks.rank, packs * ranks.world, ranks.world)

    def open_source() -> BatchSource:
        return synthetic.SyntheticSource([pack(stream) for stream in streams], packs * ranks.world)

    folder = Path(ranks.gather(_folder_beside(run.run_dir) if ranks.is_first else "")[0])
    try:
        names = [phase.name for phase in plan.phases]
        evaluate, evaluated = _evaluation(run, folder, ranks)
        meter = rehearse(build, open_source, engine, names, run_dir=folder, ranks=ranks, evaluate=evaluate)
        if ranks.is_first:
            checkpoint_bytes = sum(
                path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file()
            )
            lines = [*filter(None, (note, evaluated)), *table(meter, plan, ranks, packs)]
            lines.append(_compared("a checkpoint", plan.checkpoint_bytes(), checkpoint_bytes))
            say("\n".join(lines))
    except OutOfMemoryError as error:
        advice = "; ".join(remedies(preflight, ranks.world, gpu_gib))
        raise UserError(f"{error}; to need less: {advice}") from error
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    distributed.stop()


def _evaluation(run: Run, folder: Path, ranks: Ranks) -> tuple[Evaluate | None, str]:
    """A short evaluation by the real suites: one batch of images a rank (or all prompts), few steps; and a line."""
    if run.evaluation is None:
        return None, ""
    try:
        start = periodic_scores.start_of(
            _with_few_images(dataclasses.replace(run, run_dir=str(folder)), ranks.world)
        )
    except UserError as error:
        return None, f"evaluation: left out, {error}"
    return (lambda objective: start(ranks, objective)) if start is not None else None, ""


def _with_few_images(run: Run, world: int) -> Run:
    if isinstance(run, ClassRun) and run.evaluation is not None:
        sampling = _shortened(run.evaluation.sampling or run.sampling)
        few = dataclasses.replace(run.evaluation, sampling=sampling, num_images=sampling.batch_images * world)
        return dataclasses.replace(run, evaluation=few)
    if isinstance(run, GeneratorRun) and run.evaluation is not None:
        prompts = _shortened(run.evaluation.sampling or run.sampling)
        return dataclasses.replace(
            run, evaluation=dataclasses.replace(run.evaluation, sampling=prompts, images_per_prompt=1)
        )
    if isinstance(run, TokenizerRun) and run.evaluation is not None:
        number = run.pixels.images_per_pack * world
        return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, num_images=number))
    return run


def table(meter: Meter, plan: Plan, ranks: Ranks, packs: int) -> list[str]:
    """A line for each phase, then the estimate's error for the phases that have an estimate."""
    on_gpu = ranks.device.type == "cuda"
    columns = ("allocated", "reserved") if on_gpu else ("tensors", "resident")
    lines = [
        f"fullest of {ranks.world} ranks, {packs} packs each a step, GiB",
        f"  {'phase':32s}{'s':>10s}" + "".join(f"{name:>12s}" for name in columns),
    ]
    lines += [
        f"  {peak.name:32s}{peak.seconds:10.2f}{peak.tensors / GIB:12.3f}{peak.process / GIB:12.3f}"
        for peak in meter.peaks
    ]
    if not on_gpu:
        lines.append("  tensors are counted one by one, which takes time: the seconds are an upper bound")
    if not meter.forgets:
        lines.append("  resident: the highest since the start, this system does not forget it between phases")
    lines.append("estimate and measured peak of tensors")
    measured = {peak.name: peak.tensors for peak in meter.peaks}
    for phase in plan.phases:
        estimate = plan.peak(ranks.world, phase, packs)
        lines.append(_compared(phase.name, estimate, measured[phase.name]))
    return lines


def _compared(name: str, estimate: float, measured: float) -> str:
    error = 100 * (estimate / measured - 1)
    return f"  {name:32s} estimate {estimate / GIB:9.3f} GiB  measured {measured / GIB:9.3f} GiB  error {error:+.1f} %"


def _parts(preflight: Preflight) -> Parts:
    run = preflight.run
    if isinstance(run, TokenizerRun):
        return _tokenizer(run)
    return _class(preflight, run) if isinstance(run, ClassRun) else _generator(preflight, run)


def _tokenizer(run: TokenizerRun) -> Parts:
    preview = synthetic.pixels(run.num_preview_images, run.pixels.image_px) if run.preview_shards else None
    return (
        lambda: build_untrained(in_phases(run.stage), preview),
        lambda stream: synthetic.pixel_pack(run.pixels, stream),
        "random weights, random images",
    )


def _generator(preflight: Preflight, run: GeneratorRun) -> Parts:
    assert preflight.shape is not None
    shape, is_edit = preflight.shape, run.task == "edit"
    text = synthetic.SyntheticText(run.generator.backbone.vocab_size)
    text_tokens = INSTRUCTION_TOKENS if is_edit else TEXT_TOKENS
    decode, note = _decoder(run.autoencoder if run.preview_shards is not None else None)

    def build() -> Objective:
        config = dataclasses.replace(run.generator, init="random")
        latents = untrained_latents(shape, text.fingerprint)
        model = Generator.create(config, latents, run.engine.seed)
        preview = None
        if decode is not None:
            preview = Preview(
                synthetic.conditions(
                    shape,
                    num_images=run.num_preview_images,
                    text_tokens=text_tokens,
                    num_sources=int(is_edit),
                ),
                _shortened(run.preview_sampling),
                decode,
            )
        return FlowObjective(run.task, model, run.flow, text, start="untrained", preview=preview)

    def pack(stream: int) -> Batch:
        return synthetic.latent_pack(
            shape,
            num_tokens=run.packing.tokens_per_pack,
            text_tokens=text_tokens,
            num_sources=int(is_edit),
            num_draws=run.packing.draws_per_caption,
            has_text_loss=run.flow.text_loss_weight > 0,
            text=text,
            max_side=run.packing.max_side,
            seed=stream,
        )

    return build, pack, f"random weights, latents and texts; {note}"


def _class(preflight: Preflight, run: ClassRun) -> Parts:
    assert preflight.shape is not None
    shape, num_classes = preflight.shape, run.generator.num_classes
    decode, note = _decoder(run.autoencoder)

    def build() -> Objective:
        preview = None
        if decode is not None:
            labels = spread_labels(num_classes, run.num_preview_images)
            preview = ClassPreview(labels, _shortened(run.preview_sampling), decode)
        flow = dataclasses.replace(run.flow, init_from=None)
        latents = untrained_latents(shape)
        return build_class_objective(run.generator, flow, latents, seed=run.engine.seed, preview=preview)

    def pack(stream: int) -> Batch:
        images = run.packing.images_per_pack
        return synthetic.class_pack(shape, num_images=images, num_classes=num_classes, seed=stream)

    return build, pack, f"random weights, latents and classes; {note}"


def _shortened(sampling: SamplingT) -> SamplingT:
    return dataclasses.replace(sampling, num_steps=min(PREVIEW_STEPS, sampling.num_steps))


def _decoder(autoencoder: str | None) -> tuple[Decode | None, str]:
    """The decoder of previews, or a grey stand-in if it does not exist yet; None: the run draws no previews."""
    if autoencoder is None:
        return None, "samples: none, autoencoder or preview_shards is not set"
    if (Path(autoencoder) / CONFIG_NAME).is_file():
        return load_autoencoder(autoencoder).decode, f"samples are decoded by {autoencoder}"
    return _grey, f"samples: {autoencoder} is not there, latents are shown in grey"


def _grey(latents: Tensor) -> Tensor:
    return latents.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _folder_beside(run_dir: str) -> str:
    """A new folder on the training's file system, which has room for a checkpoint and which all nodes share."""
    parent = Path(run_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".preflight-", dir=parent)
