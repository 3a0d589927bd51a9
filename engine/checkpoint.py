"""A checkpoint is one directory, complete or absent, and it resumes on any number of ranks under any ZeRO stage.

checkpoints/step_00001000/
    rank_00000.safetensors ...   what each rank held: deepspeed_engine, optimizer states, EMA, by parameter
    state.json                   step, cursors of every data stream, fingerprints, counters, shapes, checksums

All ranks write under a temporary name (in the background if asked). When all have finished, the first rank renames the
directory and updates `latest`. `load` passes over a checkpoint whose checksums do not match and takes the one before.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from base import files
from base.config import UserError
from engine import checkpoint_folder, checkpoint_writer, deepspeed_engine
from engine.checkpoint_folder import FORMAT, Sum, file_name
from engine.checkpoint_reader import Saved
from engine.checkpoint_writer import Flat, Job, Staging
from engine.config_changes import Change, named, refuse
from engine.distributed import Ranks
from engine.ema import Ema
from engine.layout import Segment
from engine.logs import EventKind

GIB = 2**30


class Checkpoints:
    """The checkpoints of one training. All ranks together call every method whose description says `Collective`."""

    def __init__(
        self,
        root: Path,
        engines: Mapping[str, Any],
        ema: Ema | None,
        ranks: Ranks,
        *,
        keep: int,
        say: Callable[[EventKind, int, str], None],
    ) -> None:
        """`keep`: how many complete checkpoints stay; `say`: is told each event as kind, step and sentence."""
        self._root, self._engines, self._ema, self._ranks = root, engines, ema, ranks
        self._keep, self._say = keep, say
        self._staging = Staging()
        self._job: Job | None = None
        self._removal: threading.Thread | None = None
        self._state: dict[str, Any] = {}
        self._begin_s = 0.0

    @property
    def is_written(self) -> bool:
        """Whether this rank has finished a file that waits for `commit`."""
        return self._job is not None and self._job.is_done

    @property
    def newest(self) -> int:
        """Step of the newest complete checkpoint, as this rank's file system shows it; 0: there is none."""
        return max(
            (checkpoint_folder.step_of(path) for path in checkpoint_folder.all_in(self._root)), default=0
        )

    def save(self, state: Mapping[str, Any], *, background: bool, required: bool) -> None:
        """Writes a checkpoint; `state` is JSON-able, equal on every rank, and has the key `step`. Collective.

        background: returns once the values are copied; `commit` must follow when every rank `is_written`.
        required: a failure raises UserError; otherwise a failure is one warning line, and the training goes on.
        """
        self.finish()
        self._begin_s = time.monotonic()
        error = ""
        if self._ranks.is_first:
            try:
                shutil.rmtree(self._temporary(state["step"]), ignore_errors=True)
                files.make_directory(self._root)
                self._temporary(state["step"]).mkdir()
            except OSError as failure:
                error = files.reason(failure)
        if error := self._ranks.gather(error)[0]:
            self._give_up(state["step"], error, required)
            return
        self._state = {**state, "engines": {name: _facts(engine) for name, engine in self._engines.items()}}
        flats = self._flats()
        if background:
            flats = self._staging.copy(flats)
        else:
            flats = [Flat(flat.kind, flat.tensor.detach().cpu(), flat.segments) for flat in flats]
        self._job = Job(self._temporary(state["step"]) / file_name(self._ranks.rank), flats)
        if not background:
            self.finish(required=required)

    def finish(self, *, required: bool = False) -> None:
        """Completes the writing and the removals that run in the background. Collective."""
        if self._job is not None:
            self.commit(required=required)
        if self._removal is not None:
            self._removal.join()

    def commit(self, *, required: bool = False) -> None:
        """Waits for every rank's file, makes the files a checkpoint and removes old checkpoints. Collective."""
        assert self._job is not None
        total, error = None, ""
        try:
            total = self._job.result()
        except OSError as failure:
            error = files.reason(failure)
        self._job = None
        results = self._ranks.gather((total, error))
        errors = [text for _, text in results if text]
        if self._ranks.is_first and not errors:
            try:
                self._publish([total for total, _ in results])
            except OSError as failure:
                errors = [files.reason(failure)]
        if errors := self._ranks.gather(errors)[0]:
            self._give_up(self._state["step"], errors[0], required)
        else:
            step, spent_s = self._state["step"], time.monotonic() - self._begin_s
            self._say("checkpoint", step, f"saved step {step} in {spent_s:.1f} s")

    def load(
        self, fingerprints: Mapping[str, str], changed: Sequence[Change] = (), *, oldest: bool = False
    ) -> tuple[Path, dict[str, Any]] | None:
        """Restores the newest (`oldest`: the oldest) undamaged checkpoint. Collective.

        Returns its folder and state; None if there is no checkpoint yet. `changed`: the config's changes since the last
        start, which a refusal names. Raises UserError: every checkpoint is damaged, or the checkpoint belongs to other
        weights, data or code.
        """
        self.finish()
        found = self.complete()
        if self._ranks.is_first:
            checkpoint_folder.clean(self._root)
        for directory in found if oldest else reversed(found):
            state, problem = self._examine(directory)
            if not problem:
                self._check(directory, state, fingerprints, changed)
                self._restore(directory, state)
                return directory, state
            text = f"{directory} is damaged: {problem}; taking the one {'after' if oldest else 'before'}"
            self._say("warning", 0, text)
        if found:
            raise UserError(
                f"{self._root}: every checkpoint is damaged (see above); restore one from a copy, or delete the "
                "folder to start from step 0"
            )
        return None

    def complete(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first. Collective.

        The first rank lists them for all: other nodes may see a shared folder late.
        """
        names = self._ranks.gather([path.name for path in checkpoint_folder.all_in(self._root)])[0]
        return [self._root / name for name in names]

    def keep_alone(self, directory: Path, state: Mapping[str, Any]) -> None:
        """After a roll-back to `directory`: writes `state` there, then removes the newer checkpoints. Collective."""
        if self._ranks.is_first:
            checkpoint_folder.write_state(directory, state)
            files.write_text(self._root / "latest", directory.name + "\n")
            newer = [path for path in checkpoint_folder.all_in(self._root) if path > directory]
            for hidden in checkpoint_folder.hide(newer):
                shutil.rmtree(hidden)
        self._ranks.barrier()

    def _flats(self) -> list[Flat]:
        """Every tensor that this rank saves: views of the live values, not copies."""
        flats = []
        for name, engine in self._engines.items():
            segments, momentum = deepspeed_engine.segments(engine), deepspeed_engine.momentum_segments(engine)
            shards, states = deepspeed_engine.shards(engine), deepspeed_engine.states(engine)
            for index, (shard, state) in enumerate(zip(shards, states, strict=True)):
                flats.append(Flat(f"{name}/master", shard, segments[index]))
                for kind, values in state.items():
                    places = momentum if kind == "momentum_buffer" else segments
                    flats.append(Flat(f"{name}/{kind}", values, places[index]))
            if name == "main" and self._ema is not None:
                for decay, shadow in self._ema.shadows.items():
                    flats += [
                        Flat(f"{name}/ema_{decay}", values, places)
                        for values, places in zip(shadow, segments, strict=True)
                    ]
            if self._ranks.is_first:
                for buffer_name, buffer in deepspeed_engine.buffers(engine).items():
                    whole = [Segment(buffer_name, 0, buffer.numel(), 0)]
                    flats.append(Flat(f"{name}/buffer", buffer.flatten(), whole))
        return flats

    @torch.no_grad()
    def _restore(self, directory: Path, state: Mapping[str, Any]) -> None:
        names = [file_name(rank) for rank in range(state["num_ranks"])]
        with Saved(directory, names, self._ranks.rank) as saved:
            for name, engine in self._engines.items():
                segments, momentum = (
                    deepspeed_engine.segments(engine),
                    deepspeed_engine.momentum_segments(engine),
                )
                facts = state["engines"][name]
                before = deepspeed_engine.states(engine)
                for index, shard in enumerate(deepspeed_engine.shards(engine)):
                    saved.fill(f"{name}/master", segments[index], shard)
                    first_parameter, _ = deepspeed_engine.groups(engine)[index][0]
                    values = {}
                    for kind in saved.kinds(name, first_parameter) & deepspeed_engine.STATES:
                        places = momentum[index] if kind == "momentum_buffer" else segments[index]
                        size = deepspeed_engine.state_size(engine, index, kind)
                        known = before[index].get(kind)
                        dtype = torch.float32 if known is None else known.dtype
                        values[kind] = torch.zeros(size, dtype=dtype, device=shard.device)
                        saved.fill(f"{name}/{kind}", places, values[kind])
                    deepspeed_engine.set_states(engine, index, values, facts["optimizer_step"])
                if name == "main" and self._ema is not None:
                    for decay, shadow in self._ema.shadows.items():
                        for places, average in zip(segments, shadow, strict=True):
                            saved.fill(f"{name}/ema_{decay}", places, average)
                for buffer_name, buffer in deepspeed_engine.buffers(engine).items():
                    flat = torch.empty(buffer.numel(), dtype=buffer.dtype, device=buffer.device)
                    saved.fill(f"{name}/buffer", [Segment(buffer_name, 0, buffer.numel(), 0)], flat)
                    buffer.copy_(flat.view(buffer.shape))
                deepspeed_engine.set_counters(engine, facts["counters"])
                deepspeed_engine.push(engine)

    def _examine(self, directory: Path) -> tuple[dict[str, Any], str]:
        """A checkpoint's state, and what is wrong with it ('': nothing). One rank reads each file. Collective.

        Raises UserError: another version of the code wrote it, in another format.
        """
        state, problem = self._ranks.gather(
            checkpoint_folder.read_state(directory) if self._ranks.is_first else None
        )[0]
        if problem:
            return state, problem
        if state["format"] != FORMAT:
            raise UserError(
                f"{directory}: format {state['format']}, this code reads {FORMAT}; finish the run with the version "
                "that wrote it, or start a new run_dir from its export"
            )
        expected = checkpoint_folder.sums(state)
        mine = sorted(expected)[self._ranks.rank :: self._ranks.world]
        problems = [checkpoint_writer.checked(directory / name, expected[name]) for name in mine]
        found = [text for texts in self._ranks.gather(problems) for text in texts if text]
        return state, found[0] if found else ""

    def _check(
        self,
        directory: Path,
        state: Mapping[str, Any],
        fingerprints: Mapping[str, str],
        changed: Sequence[Change],
    ) -> None:
        """Raises UserError when a good checkpoint does not belong to this run."""
        refuse(changed, str(directory))
        for name, value in fingerprints.items():
            if state["fingerprints"].get(name) != value:
                raise UserError(
                    f"{directory}: its {name} differs from this run's ({named(changed)}); "
                    "go back to what it was started from, or use a new run_dir"
                )
        for name, engine in self._engines.items():
            saved, wanted = (
                state["engines"].get(name, {"shapes": {}})["shapes"],
                deepspeed_engine.shapes(engine),
            )
            if differing := sorted(key for key in {*saved, *wanted} if saved.get(key) != wanted.get(key)):
                key = differing[0]
                raise UserError(
                    f"{directory}: parameter {key} of {name} has shape {saved.get(key)}, this run's model "
                    f"{wanted.get(key)} ({named(changed)}); go back to the config it was started with, or use a new "
                    "run_dir"
                )
        if self._ema is not None:
            for decay in self._ema.shadows:
                if decay not in state["ema_decays"]:
                    raise UserError(
                        f"{directory}: has no average with engine.ema_decay {decay}, only {state['ema_decays']}; "
                        "set it back, or use a new run_dir"
                    )

    def _publish(self, totals: Sequence[Sum]) -> None:
        """Makes the written files a checkpoint. The first rank calls this when all files are on the disk."""
        temporary, final = self._temporary(self._state["step"]), self._final(self._state["step"])
        written = {
            file_name(rank): {"bytes": total.num_bytes, "crc32": total.crc32}
            for rank, total in enumerate(totals)
        }
        decays = list(self._ema.shadows) if self._ema else []
        state = {**self._state, "format": FORMAT, "num_ranks": len(totals), "files": written}
        checkpoint_folder.write_state(temporary, {**state, "ema_decays": decays})
        old = checkpoint_folder.hide([final] if final.exists() else [])
        temporary.rename(final)
        files.fsync_directory(self._root)
        files.write_text(self._root / "latest", final.name + "\n")
        old += checkpoint_folder.hide(checkpoint_folder.all_in(self._root)[: -self._keep])
        self._removal = threading.Thread(target=_remove, args=(old,), daemon=True)  # gigabytes take a while
        self._removal.start()

    def _give_up(self, step: int, reason: str, required: bool) -> None:
        if self._ranks.is_first:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        folder = next(path for path in (self._root, *self._root.parents) if path.exists())
        free_gib = shutil.disk_usage(folder).free / GIB
        text = (
            f"the checkpoint of step {step} could not be saved: {reason}; {free_gib:.2f} GiB are free there"
        )
        if required:
            raise UserError(f"{text}; make room and run the same command again")
        self._say("warning", step, f"WARNING: {text}; the training goes on, the earlier checkpoints stay")

    def _temporary(self, step: int) -> Path:
        return self._root / f".{self._final(step).name}.tmp"

    def _final(self, step: int) -> Path:
        return self._root / f"step_{step:08d}"


def _facts(engine: Any) -> dict[str, Any]:
    """An engine's counters, optimizer step and shapes, which are equal on every rank."""
    return {
        "counters": deepspeed_engine.counters(engine),
        "optimizer_step": deepspeed_engine.optimizer_step(engine),
        "shapes": deepspeed_engine.shapes(engine),
    }


def _remove(hidden: Sequence[Path]) -> None:
    """Removes folders that `hide` renamed. What cannot be removed now is removed by `clean` at the next start."""
    for path in hidden:
        shutil.rmtree(path, ignore_errors=True)
