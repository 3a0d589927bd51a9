"""Watches a run for non-finite steps, loss spikes, alarms, ranks that drift apart and full memory."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from base import files
from base.config import UserError
from base.objective import HISTORY_WINDOWS, Batch, Objective
from engine import deepspeed_engine
from engine.distributed import Ranks
from engine.engine_config import EngineConfig
from engine.logs import EventKind
from engine.memory import asked_for

NUM_LOSSES, FEWEST_LOSSES = 100, 20
"""Number of past losses that a spike is compared with, and the fewest that allow a comparison."""

NONFINITE, SPIKES = "nonfinite", "spikes"
"""Folders that keep the batches of steps that were not taken."""

MEMORY_ADVICE = {
    "": "lower packing.tokens_per_pack or pixels.images_per_pack, turn on activation_checkpointing, or raise "
    "engine.zero_stage",
    "optimizer": "raise engine.zero_stage, or use more ranks",
    "samples": "lower preview_sampling.batch_images or num_preview_images",
}


class Guard:
    """Counts trouble and decides what follows (`engine.on_alarm`). Every rank decides alike.

    Attributes: `alarm`: why the loop must roll back, empty while nothing is wrong; `nonfinite_steps`: their number
    since the start or the last roll-back.
    """

    def __init__(
        self,
        objective: Objective,
        config: EngineConfig,
        run_dir: Path,
        ranks: Ranks,
        say: Callable[[EventKind, int, str], None],
    ) -> None:
        """`say`: is told each event as kind, step and sentence; every rank calls it."""
        self.alarm = ""
        self.nonfinite_steps = 0
        self._roll_backs = 0
        self._objective, self._config, self._run_dir, self._ranks = objective, config, run_dir, ranks
        self._say = say
        self._history: deque[Mapping[str, float]] = deque(maxlen=HISTORY_WINDOWS)
        self._losses: deque[float] = deque(maxlen=NUM_LOSSES)
        self._spikes_in_a_row = 0

    def nonfinite(self, step: int, batches: Sequence[Batch]) -> None:
        """Handles a non-finite step, which was not taken: keeps its batch; too many end the run or roll it back."""
        self.nonfinite_steps += 1
        kept = self._keep(NONFINITE, step, batches)
        text = f"step {step}: non-finite loss or gradient, step not taken; {kept}"
        self._say("nonfinite", step, text)
        if self.nonfinite_steps < self._config.max_nonfinite_steps:
            return
        self.alarm = f"{self.nonfinite_steps} steps with a non-finite loss or gradient"
        if self._config.on_alarm != "roll_back":
            raise UserError(
                f"{self.alarm} (last: {step}); look at {self._run_dir / NONFINITE}, lower "
                "engine.optimizer.lr, and run again from the last checkpoint"
            )

    def is_spike(self, loss: float) -> bool:
        """Whether a step's mean loss (equal on every rank) is far above the last losses; if not, remembers it."""
        known = len(self._losses) >= FEWEST_LOSSES
        if known and loss > self._config.loss_spike_factor * median(self._losses):
            return True
        self._spikes_in_a_row = 0
        if loss == loss:  # `nonfinite` handles NaN
            self._losses.append(loss)
        return False

    def spike(self, step: int, loss: float, batches: Sequence[Batch]) -> None:
        """Handles a step not taken because of its loss: keeps its batch; rolls back, or after too many ends the run."""
        self._spikes_in_a_row += 1
        kept = self._keep(SPIKES, step, batches)
        reason = f"loss {loss:.4g} at a median of {median(self._losses):.4g}"
        self._say("spike", step, f"step {step}: {reason}, step not taken; {kept}")
        if self._config.on_loss_spike == "roll_back":
            self.alarm = reason
        elif self._spikes_in_a_row >= self._config.max_nonfinite_steps:
            raise UserError(
                f"{self._spikes_in_a_row} loss spikes in a row (last: step {step}, {reason}); look at "
                f"{self._run_dir / SPIKES}, lower engine.optimizer.lr or raise engine.loss_spike_factor, and run again "
                "from the last checkpoint"
            )

    def _keep(self, kind: str, step: int, batches: Sequence[Batch]) -> str:
        """Writes the batch for a post-mortem. Returns where it is, or why it could not be written."""
        again = f"_roll_back_{self._roll_backs}" if self._roll_backs else ""  # a step then has other data
        path = self._run_dir / kind / f"step_{step:08d}_rank_{self._ranks.rank:05d}{again}.pt"
        content = io.BytesIO()
        torch.save([batch.__dict__ for batch in batches], content)
        try:
            files.write_bytes(path, content.getvalue())
        except OSError as error:
            return f"batch not kept: {files.reason(error)}"
        return f"batch kept in {path}"

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Asks the objective for alarms about the window just logged. Raises UserError: an alarm stops the run."""
        self._history.append(values)
        alarms = list(self._objective.alarms(list(self._history)))
        for alarm in alarms:
            self._say("alarm", step, f"ALARM at step {step}: {alarm}")
        if alarms and self._config.on_alarm == "stop":
            raise UserError(
                f"stopped at step {step} by an alarm ({alarms[0]}); look at {self._run_dir}, change the config or "
                "set engine.on_alarm=warn, and run again from the last checkpoint"
            )
        if alarms and self._config.on_alarm == "roll_back":
            self.alarm = alarms[0]

    def begin_roll_back(self, step: int, has_checkpoint: bool) -> str:
        """Returns the reason, and forgets it and the history. Raises UserError: no checkpoint, or no roll-back left."""
        reason, self.alarm = self.alarm, ""
        if not has_checkpoint or self._roll_backs >= self._config.max_roll_backs:
            why = (
                f"{self._roll_backs} roll-backs did not help"
                if has_checkpoint
                else "there is no checkpoint yet"
            )
            raise UserError(f"stopped at step {step}: {reason}, and {why}; lower engine.optimizer.lr")
        self._roll_backs += 1
        self.nonfinite_steps = self._spikes_in_a_row = 0
        self._history.clear()
        self._losses.clear()
        return reason

    def check_replicas(self, step: int, engines: Mapping[str, Any]) -> None:
        """Before a checkpoint: weights that every rank holds whole must have equal bits on all ranks. Collective.

        Raises UserError naming the ranks that differ. ZeRO-3 has no replicas.
        """
        if self._config.zero_stage == 3 or self._ranks.world == 1:
            return
        for name, engine in engines.items():
            sums = self._ranks.gather(deepspeed_engine.checksum(engine.module))
            if differing := [rank for rank, value in enumerate(sums) if value != sums[0]]:
                raise UserError(
                    f"step {step}: the {name} weights of ranks {differing} differ from rank 0's; nothing was saved. "
                    "Check those ranks' hardware and versions, then run again from the last checkpoint"
                )

    def state_dict(self) -> dict[str, Any]:
        """Counters and last losses, JSON-able, for the checkpoint."""
        return {
            "nonfinite_steps": self.nonfinite_steps,
            "roll_backs": self._roll_backs,
            "spikes_in_a_row": self._spikes_in_a_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.nonfinite_steps, self._roll_backs = state["nonfinite_steps"], state["roll_backs"]
        self._spikes_in_a_row = state["spikes_in_a_row"]
        self._losses.extend(state["losses"])


def out_of_memory(error: RuntimeError, step: int, part: str) -> UserError | None:
    """The one-line error for a device (or host) whose memory is full; None: `error` has another cause.

    `part`: the part of the step in which it happened.
    """
    asked = asked_for(error)
    if asked is None:
        return None
    return UserError(
        f"step {step}, in {part or 'the loop'}: out of memory, {asked}; {MEMORY_ADVICE.get(part, MEMORY_ADVICE[''])}; "
        "launch/preflight.py --execute measures what each part needs"
    )
