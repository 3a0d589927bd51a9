"""Loads a checkpoint of any number of ranks into a model in one process, without other ranks or a launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.config import UserError
from engine import checkpoint_folder, checkpoint_writer
from engine.checkpoint_folder import FORMAT
from engine.checkpoint_reader import Saved
from engine.layout import Segment

PREFIX = "module."
"""Prefix of a model's parameter names inside DeepSpeed's engine (engine/deepspeed_engine.py, Forward)."""


def find(root: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """An undamaged checkpoint below `root`, and its state; `which`: a step, or `latest` for the newest undamaged one.

    Raises UserError: there is no such checkpoint, or it is damaged.
    """
    there = checkpoint_folder.all_in(root)
    steps = ", ".join(str(checkpoint_folder.step_of(path)) for path in there) or "none"
    if which != "latest":
        there = [path for path in there if str(checkpoint_folder.step_of(path)) == which]
    problems = []
    for directory in reversed(there):
        state, problem = checkpoint_folder.read_state(directory)
        if not problem and state["format"] != FORMAT:
            problem = f"format {state['format']}, this code reads {FORMAT}"
        if not problem:
            found = (
                checkpoint_writer.checked(directory / name, expected)
                for name, expected in checkpoint_folder.sums(state).items()
            )
            problem = next(filter(None, found), "")
        if not problem:
            return directory, state
        problems.append(f"{directory.name}: {problem}")
    why = f" ({'; '.join(problems)})" if problems else ""
    raise UserError(f"{root}: no good checkpoint '{which}'{why}; steps that are there: {steps}")


@torch.no_grad()
def load(directory: Path, state: dict[str, Any], model: nn.Module, decay: float | None) -> None:
    """Fills an objective's `model`, on the CPU in fp32, with the average of `decay` (None: the weights themselves).

    Frozen parameters stay as they are. Raises UserError: the checkpoint is another model's, or lacks that average.
    """
    if decay is not None and decay not in state["ema_decays"]:
        raise UserError(
            f"{directory}: has no average with engine.ema_decay {decay}, only {state['ema_decays']}"
        )
    kind = "main/master" if decay is None else f"main/ema_{decay}"
    if "main" not in state["engines"]:
        raise UserError(f"{directory}: is no checkpoint of a training of ours; take another one")
    shapes = state["engines"]["main"]["shapes"]
    own = {f"{PREFIX}{name}": parameter for name, parameter in model.named_parameters()}
    wanted = {name: list(parameter.shape) for name, parameter in own.items() if parameter.requires_grad}
    if differing := sorted(key for key in {*shapes, *wanted} if shapes.get(key) != wanted.get(key)):
        key = differing[0]
        raise UserError(
            f"{directory}: parameter {key} has shape {shapes.get(key)} there, {wanted.get(key)} in the model of the "
            "run's config.json; they do not belong together"
        )
    buffers = {f"{PREFIX}{name}": buffer for name, buffer in model.named_buffers()}
    names = [checkpoint_folder.file_name(rank) for rank in range(state["num_ranks"])]
    with Saved(directory, names, 0) as saved:
        for name in shapes:
            _fill(saved, kind, name, own[name])
        for name in buffers:
            if "buffer" in saved.kinds("main", name):
                _fill(saved, "main/buffer", name, buffers[name])


def _fill(saved: Saved, kind: str, name: str, tensor: torch.Tensor) -> None:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    saved.fill(kind, [Segment(name, 0, tensor.numel(), 0)], flat)
    tensor.copy_(flat.view(tensor.shape))
