"""The report of --dry-run: parameter counts, and estimates of memory and time."""

from __future__ import annotations

from collections.abc import Sequence

from base.config import dump
from base.objective import Objective
from generator.flow import resolve_shift
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun
from launch.sizing.estimate import GIB, Plan, latent_shape, num_parameters, plan_of
from launch.sizing.step_time import H100

GPU_COUNTS = (1, 8, 32, 256)


def report(run: Run) -> str:
    """The report of a training. Without shards of latents, a note says that their shape is assumed."""
    shape, note = latent_shape(run)
    plan = plan_of(run, shape)
    lines = [*([note] if note else []), dump(run) + "---", *_sizes(plan)]
    if shape is not None and not isinstance(run, TokenizerRun):
        shift = resolve_shift(run.flow.time_shift, shape)
        lines.append(f"time shift of {'x'.join(map(str, shape))}: {shift:.3g}")
    lines.append(f"a step: {_step(run, plan)}, {plan.step_flops:.3g} FLOP; {plan.engine.steps:,} steps")
    return "\n".join([*lines, *_on_gpus(plan)])


def _step(run: Run, plan: Plan) -> str:
    """What a step reads, in the words of the run's task."""
    if isinstance(run, GeneratorRun):
        return f"{plan.num_tokens:,} tokens, about {plan.num_images:,} targets"
    if isinstance(run, ClassRun):
        return f"{plan.num_images:,} images of {plan.num_tokens // plan.num_images} tokens"
    return f"{plan.num_images} images"


def objective_run(run: object, objective: Objective) -> str:
    """The report of a small training, whose model is built to count its parameters."""
    return f"{dump(run)}---\nparameters: {num_parameters(objective.model):,}"


def _sizes(plan: Plan) -> list[str]:
    return [
        *(f"parameters: {name} {count + plan.frozen[name]:,}" for name, count in plan.trained.items()),
        f"trained: {plan.num_trained:,} of {plan.num_parameters:,}",
    ]


def _on_gpus(plan: Plan) -> list[str]:
    """Lines of memory and time by number of GPUs. launch/preflight.py shows the parts of the memory."""
    counts = [gpus for gpus in GPU_COUNTS if gpus <= plan.num_streams]
    lines = [
        f"activations of a pack: {plan.activations / GIB:.1f} GiB",
        f"on N GPUs (ZeRO-{plan.engine.zero_stage}), memory of each; a step's packs, and its exchange and optimizer; "
        "the run:",
    ]
    for gpus in GPU_COUNTS:
        if gpus not in counts:
            lines.append(f"  {gpus:3d}: refused, a step has {plan.num_streams} packs (data.num_streams)")
            continue
        step = f"{plan.compute_s(gpus):7.3f} s + {plan.exchange_s(gpus):5.3f} s"
        lines.append(f"  {gpus:3d}: {plan.memory_gib(gpus):6.1f} GiB, {step}, {plan.hours(gpus):9.1f} h")
    return [*lines, *time_parts(plan, counts)]


def time_parts(plan: Plan, gpu_counts: Sequence[int]) -> list[str]:
    """A line for each part of a step, a column for each number of GPUs."""
    columns = [plan.step_time(gpus).parts for gpus in gpu_counts]
    heading = f"a step's ms by arithmetic ({H100.name}s, launch/sizing/step_time.py)"
    return [
        f"{heading:40s}" + "".join(f"{gpus:10d}" for gpus in gpu_counts),
        *(f"  {name:38s}" + "".join(f"{1000 * part[name]:10.1f}" for part in columns) for name in columns[0]),
        f"  {'sum':38s}" + "".join(f"{1000 * sum(part.values()):10.1f}" for part in columns),
    ]
