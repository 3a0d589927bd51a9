"""The report of launch/preflight.py: memory by ZeRO stage, storage and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from base.config import UserError
from data.shards import ShardDataset
from launch.runs.configs import ClassRun, GeneratorRun, TokenizerRun
from launch.sizing.dry_run import time_parts
from launch.sizing.estimate import (
    CONTEXT_GIB,
    GIB,
    PEAK,
    Plan,
    class_plan,
    generator_plan,
    latent_shape,
    untrained_latents,
)
from launch.sizing.run_kinds import Run, Task
from launch.sizing.stage_size import tokenizer_plan

RunT = TypeVar("RunT", bound=Run)
STAGES = (1, 2, 3)
TOKEN_STEP = 256  # suggested packs of more tokens are multiples of this
IMAGENET_CLASSES, IMAGENET_IMAGES = 1_000, 1_281_167
PACKS: dict[type[Run], tuple[str, str]] = {
    TokenizerRun: ("pixels", "images_per_pack"),
    GeneratorRun: ("packing", "tokens_per_pack"),
    ClassRun: ("packing", "images_per_pack"),
}
"""The config's section and field that set the size of a pack, by task."""
CHECKPOINTING = "activation_checkpointing"


@dataclass(frozen=True)
class Preflight:
    """A run and its plan."""

    task: Task
    run: Run
    plan: Plan
    shape: tuple[int, int, int] | None
    """Shape (C, Y, X) of a generator's latents."""
    note: str = ""

    @property
    def pack_key(self) -> str:
        """The config's key for the size of a pack."""
        return ".".join(PACKS[type(self.run)])

    @property
    def counts_tokens(self) -> bool:
        """Whether the size of a pack is in tokens; otherwise it is in images."""
        return self.pack_key.endswith(".tokens_per_pack")

    @property
    def checkpointing_key(self) -> str:
        """The config's key for activation checkpointing."""
        return f"{self._trained}.{CHECKPOINTING}"

    def zero_change(self, stage: int) -> str:
        """The settings that change the ZeRO stage; stage 3 also needs compiling off."""
        is_compiled = not isinstance(self.run, TokenizerRun) and self.run.flow.compile
        return f"engine.zero_stage={stage}" + (" flow.compile=false" if stage == 3 and is_compiled else "")

    def with_pack(self, units: int) -> Plan:
        """The plan with packs of `units` tokens or images."""
        section, field = PACKS[type(self.run)]
        return _plan(self.task, _changed(self.run, section, field, units), self.shape)

    def with_checkpointing(self) -> Plan | None:
        """The plan with activation checkpointing; None: the run has it already."""
        changed = _changed(self.run, self._trained, CHECKPOINTING, True)
        return None if changed == self.run else _plan(self.task, changed, self.shape)

    @property
    def _trained(self) -> str:
        """The config's section for the objective."""
        return "stage" if isinstance(self.run, TokenizerRun) else "flow"


def plan_run(task: Task, run: Run) -> Preflight:
    """Plans a run. Raises UserError: an earlier stage's export is missing."""
    shape, note = (None, "") if isinstance(run, TokenizerRun) else latent_shape(run)
    return Preflight(task, run, _plan(task, run, shape), shape, note)


def _plan(task: Task, run: Run, shape: tuple[int, int, int] | None) -> Plan:
    if isinstance(run, TokenizerRun):
        return tokenizer_plan(run)
    assert shape is not None
    if isinstance(run, ClassRun):
        return class_plan(run, shape)
    return generator_plan(run, shape, is_edit=task == "edit")


def _changed(run: RunT, section: str, field: str, value: Any) -> RunT:
    """A copy with one field of a section set."""
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{field: value})})


def report(preflight: Preflight, *, num_gpus: int, gpu_gib: float, mfu: float | None) -> str:
    """All tables. Raises UserError: more GPUs than packs."""
    plan = preflight.plan
    if num_gpus > plan.num_streams:
        raise UserError(
            f"{num_gpus} GPUs, but a step has {plan.num_streams} packs (data.num_streams); raise it or take fewer"
        )
    return "\n".join(
        [
            *([preflight.note] if preflight.note else []),
            *_parameters(plan),
            *_memory(preflight, num_gpus, gpu_gib),
            *_storage(preflight),
            *_time(preflight, num_gpus, mfu),
        ]
    )


def remedies(preflight: Preflight, num_gpus: int, gpu_gib: float) -> list[str]:
    """Changes of the config that make the run fit, one a line, cheapest first."""
    plan, limit = preflight.plan, (gpu_gib - CONTEXT_GIB) * GIB
    lines = [
        f"{preflight.zero_change(stage)}: {plan.at(stage).peak(num_gpus) / GIB:.1f} GiB"
        for stage in _allowed_stages(preflight)
        if stage > plan.engine.zero_stage and plan.at(stage).peak(num_gpus) <= limit
    ]
    checkpointed = preflight.with_checkpointing()
    if checkpointed is not None:
        peak = checkpointed.peak(num_gpus)
        fits = "" if peak <= limit else ", still too much alone"
        lines.append(f"{preflight.checkpointing_key}=true: {peak / GIB:.1f} GiB{fits}")
    smaller = _smaller_pack(preflight, num_gpus, limit)
    if smaller is not None:
        units, peak = smaller
        streams = -(-plan.num_streams * plan.pack_units // units)
        lines.append(
            f"{preflight.pack_key}={units} data.num_streams={streams}: {peak / GIB:.1f} GiB, as much in a step"
        )
    if smaller is None:
        lines.append(
            f"no {preflight.pack_key} does it alone; take more GPUs or larger ones, or both of the above"
        )
    return lines


def _smaller_pack(preflight: Preflight, num_gpus: int, limit: float) -> tuple[int, float] | None:
    """The largest pack that fits and still holds a sample, and its peak; None: there is none."""
    plan = preflight.plan
    least = -(-plan.num_tokens // plan.num_images) if preflight.counts_tokens else 1
    room = limit - plan.peak(num_gpus) + plan.activations
    units = min(int(plan.pack_units * room / plan.activations), plan.pack_units - 1)
    while units >= least:
        if preflight.counts_tokens and units > TOKEN_STEP:
            units -= units % TOKEN_STEP
        peak = preflight.with_pack(units).peak(num_gpus)
        if peak <= limit:
            return units, peak
        units = min(int(units * 0.9), units - 1)
    return None


def _allowed_stages(preflight: Preflight) -> tuple[int, ...]:
    """ZeRO stages that the run's config allows (launch/runs/configs.py)."""
    run = preflight.run
    weighs_pivot = isinstance(run, TokenizerRun) and run.stage.weighs_pivot
    return STAGES[:2] if preflight.plan.num_adversary or weighs_pivot else STAGES


def _parameters(plan: Plan) -> Iterator[str]:
    rows = {name: (count, plan.frozen[name]) for name, count in plan.trained.items()}
    if plan.num_adversary:
        rows["discriminator heads"] = (plan.num_adversary, 0)
    yield f"{'parameters':42s}{'trained':>16s}{'frozen':>16s}"
    yield from (f"  {name:40s}{trained:16,}{frozen:16,}" for name, (trained, frozen) in rows.items())


def _memory(preflight: Preflight, num_gpus: int, gpu_gib: float) -> Iterator[str]:
    plan, limit = preflight.plan, (gpu_gib - CONTEXT_GIB) * GIB
    stages = _allowed_stages(preflight)
    states = [
        plan.at(stage).model_state(num_gpus) + plan.at(stage).adversary_state(num_gpus) for stage in stages
    ]

    def row(name: str, values: list[float]) -> str:
        return f"  {name:40s}" + "".join(f"{value / GIB:10.2f}" for value in values)

    yield ""
    yield f"memory of each of {num_gpus} GPUs, GiB".ljust(42) + "".join(
        f"{f'ZeRO-{stage}':>10s}" for stage in stages
    )
    yield row("weights", [state.weights for state in states])
    yield row("optimizer: fp32 weights, moments", [state.optimizer for state in states])
    yield row("EMA", [state.ema for state in states])
    yield row("gradients", [state.gradients for state in states])
    yield row("communication buffers", [state.buffers for state in states])
    if plan.helper_bytes:
        yield row("frozen networks", [plan.helper_bytes] * len(stages))
    for phase in plan.phases:
        yield row(f"activations: {phase.name}", [phase.activations] * len(stages))
    peaks = [plan.at(stage).peak(num_gpus) for stage in stages]
    yield row("peak of a step", peaks)
    fits = ["yes" if peak <= limit else "NO" for peak in peaks]
    name = f"fits in {gpu_gib:g} less {CONTEXT_GIB:g} for CUDA"
    yield f"  {name:40s}" + "".join(f"{word:>10s}" for word in fits)
    chosen = plan.engine.zero_stage
    if plan.peak(num_gpus) <= limit:
        yield f"  the config's ZeRO-{chosen} fits"
    else:
        yield f"  the config's ZeRO-{chosen} does NOT fit; what would:"
        yield from (f"    {line}" for line in remedies(preflight, num_gpus, gpu_gib))


def _storage(preflight: Preflight) -> Iterator[str]:
    plan, run = preflight.plan, preflight.run
    yield ""
    yield "storage"
    for of_set in run.data.sets.values():
        yield f"  shards {of_set.shards}: {_shards(preflight, of_set.shards)}"
    one, keep = plan.checkpoint_bytes(), plan.engine.keep_checkpoints
    yield (
        f"  checkpoints: {one / GIB:.2f} GiB each, {keep} kept, one more while it is written: "
        f"{one * (keep + 1) / GIB:.1f} GiB; a save every {plan.engine.checkpoint_every_steps:,} steps"
    )
    count = max(1, len(plan.engine.ema_decays)) + len(plan.engine.export_at_steps)
    several = f" each, {count} of them" if count > 1 else ""
    yield f"  export: {plan.export_bytes() / GIB:.2f} GiB{several}"


def _shards(preflight: Preflight, shards: str) -> str:
    try:
        manifest = ShardDataset.open(shards, preflight.run.data.storage).manifest
    except UserError:
        if preflight.shape is None:
            return "unknown, they are not there, and the size of the image files is nowhere in the config"
        each = (2 if preflight.task == "edit" else 1) * untrained_latents(preflight.shape).num_bytes
        count, whose, beside = 1_000_000, "a million", "texts apart"
        if isinstance(preflight.run, ClassRun):
            beside = "with their mirror images twice that"
            if preflight.run.generator.num_classes == IMAGENET_CLASSES:
                count, whose = IMAGENET_IMAGES, f"ImageNet's {IMAGENET_IMAGES:,}"
        return (
            f"unknown, they are not there; in bf16 the latents of a sample take {each / 1024:.0f} KiB, of {whose} "
            f"{count * each / GIB:.0f} GiB, {beside}"
        )
    total = sum(entry.num_bytes for entry in manifest.shards)
    return f"{total / GIB:.2f} GiB, {manifest.num_samples:,} samples"


def _time(preflight: Preflight, num_gpus: int, mfu: float | None) -> Iterator[str]:
    plan = preflight.plan
    steps = plan.engine.steps
    yield ""
    yield "time"
    unit = preflight.pack_key.partition(".")[2].partition("_")[0]
    packs = f"{plan.num_streams} packs of {plan.pack_units:,} {unit}"
    yield (
        f"  a step: {packs}, {plan.num_images:,} images, {plan.num_tokens:,} tokens, {plan.step_flops:.3g} FLOP"
    )
    yield (
        f"  the run: {steps:,} steps, {steps * plan.num_images:,} images, {steps * plan.num_tokens:,} tokens, "
        f"{plan.run_flops:.3g} FLOP"
    )
    parts = f"{plan.compute_s(num_gpus, mfu):.3f} s computing and {plan.exchange_s(num_gpus):.3f} s exchange a step"
    hours = f"  {plan.hours(num_gpus, mfu):,.1f} hours on {num_gpus} GPUs ({parts})"
    if mfu is None:
        yield f"{hours}, by arithmetic:"
        yield from (f"  {line}" for line in time_parts(plan, [num_gpus]))
        return
    yield f"{hours}, if the MFU is {mfu:g}"
    yield f"  of an H100's {PEAK / 1e12:.0f} TFLOP/s: an assumption, not a measurement"
