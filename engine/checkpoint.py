"""A checkpoint is one directory, complete or absent: written under a temporary name, renamed, then `latest` updated.

checkpoints/step_00001000/
    state.json               step, data cursors of every stream, fingerprints, ranks, counters
    main/  adversary/        DeepSpeed's own files (weights, masters, moments)
    main_ema_00000.safetensors   EMA shards of each rank
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import files
from engine.config import UserError
from engine.distributed import Ranks
from engine.ema import Ema

FORMAT = 1
STATE = "state.json"
TAG = "state"


def save(
    root: Path,
    *,
    step: int,
    engines: Mapping[str, Any],
    ema: Ema | None,
    state: Mapping[str, Any],
    ranks: Ranks,
    keep: int,
) -> None:
    """Writes checkpoint `step` from all ranks and removes all but the newest `keep`. Collective."""
    final = root / f"step_{step:08d}"
    temporary = root / f".{final.name}.tmp"
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    for name, engine in engines.items():
        # DeepSpeed's own `latest` is written before the other ranks have finished: ours is the rename below.
        engine.save_checkpoint(
            str(temporary / name), tag=TAG, save_latest=False, exclude_frozen_parameters=True
        )
    if ema is not None:
        ema.save(temporary / _ema_name(ranks.rank))
    ranks.barrier()
    if ranks.is_first:
        files.write_json(
            temporary / STATE, {**state, "format": FORMAT, "step": step, "num_ranks": ranks.world}
        )
        files.fsync_tree(temporary)
        if final.exists():
            _remove(final)
        temporary.rename(final)
        files.fsync_directory(root)
        files.write_text(root / "latest", final.name + "\n")
        for old in list_complete(root)[:-keep]:
            _remove(old)
    ranks.barrier()


def list_complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first, as this rank's file system shows them."""
    return sorted(path.parent for path in root.glob(f"step_*/{STATE}"))


def agreed(root: Path, ranks: Ranks) -> list[Path]:
    """Complete checkpoints as the first rank sees them: other nodes may see a shared folder late. Collective."""
    names = ranks.gather([path.name for path in list_complete(root)])[0]
    return [root / name for name in names]


def keep_alone(directory: Path, state: Mapping[str, Any], ranks: Ranks) -> None:
    """After a roll-back to `directory`: its state becomes `state`, and only then the newer ones go. Collective."""
    if ranks.is_first:
        files.write_json(directory / STATE, dict(state))
        for newer in [path for path in list_complete(directory.parent) if path > directory]:
            _remove(newer)
        files.write_text(directory.parent / "latest", directory.name + "\n")
    ranks.barrier()


def _remove(directory: Path) -> None:
    """Under another name first: killed in between, nothing is left that looks complete."""
    hidden = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden)


def load(
    directory: Path,
    *,
    engines: Mapping[str, Any],
    ema: Ema | None,
    fingerprints: Mapping[str, str],
    ranks: Ranks,
) -> dict[str, Any]:
    """Restores a complete checkpoint and returns its state. Collective.

    Raises UserError when the checkpoint was started from other weights or data, or on another number of ranks.
    """
    state: dict[str, Any] = files.read_json(directory / STATE)
    if state["format"] != FORMAT:
        raise UserError(f"{directory}: format {state['format']}, this code reads {FORMAT}; use its version")
    if state["num_ranks"] != ranks.world:
        raise UserError(
            f"{directory}: saved on {state['num_ranks']} ranks, cannot resume on {ranks.world}; "
            f"launch with --num_gpus {state['num_ranks']} or start a new run_dir"
        )
    for name, value in fingerprints.items():
        if state["fingerprints"].get(name) != value:
            raise UserError(
                f"{directory}: its {name} differs from this run's; "
                "go back to what it was started from, or use a new run_dir"
            )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(directory / name), tag=TAG, load_module_strict=False)
        if loaded is None:
            raise UserError(
                f"{directory / name}: DeepSpeed cannot read it; remove {directory} to use the one before"
            )
    if ema is not None:
        ema.load(directory / _ema_name(ranks.rank))
    return state


def _ema_name(rank: int) -> str:
    return f"main_ema_{rank:05d}.safetensors"
