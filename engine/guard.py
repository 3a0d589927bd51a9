"""What can go wrong while a run goes on: non-finite steps, alarms of the objective, ranks that drifted apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine import masters
from engine.config import UserError
from engine.distributed import Ranks
from engine.engine_config import EngineConfig
from engine.logs import say
from engine.objective import HISTORY_WINDOWS, Batch, Objective


class Guard:
    """Counts trouble and decides what follows (`engine.on_alarm`). The same decisions on every rank.

    Attributes: `alarm`, why the loop shall roll back, empty while nothing is wrong; `nonfinite_steps` since the
    start or the last roll-back.
    """

    def __init__(self, objective: Objective, config: EngineConfig, run_dir: Path, ranks: Ranks) -> None:
        self.alarm = ""
        self.nonfinite_steps = 0
        self._roll_backs = 0
        self._objective, self._config, self._run_dir, self._ranks = objective, config, run_dir, ranks
        self._history: deque[Mapping[str, float]] = deque(maxlen=HISTORY_WINDOWS)

    def nonfinite(self, step: int, batches: Sequence[Batch]) -> None:
        """A step that was not taken: keeps its batch for a post-mortem; ends the run or rolls back after too many."""
        self.nonfinite_steps += 1
        folder = self._run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        again = f"_roll_back_{self._roll_backs}" if self._roll_backs else ""  # the same step, other data
        path = folder / f"step_{step:08d}_rank_{self._ranks.rank:05d}{again}.pt"
        torch.save([batch.__dict__ for batch in batches], path)
        self._say(f"step {step}: non-finite loss or gradient, step not taken; batch kept in {path}")
        if self.nonfinite_steps < self._config.max_nonfinite_steps:
            return
        self.alarm = f"{self.nonfinite_steps} steps with a non-finite loss or gradient"
        if self._config.on_alarm != "roll_back":
            raise UserError(
                f"{self.alarm} (last: {step}); look at {folder}, lower engine.optimizer.lr, and run again from "
                "the last checkpoint"
            )

    def look(self, step: int, values: Mapping[str, float]) -> None:
        """Asks the objective about the window that was just logged."""
        self._history.append(values)
        alarms = list(self._objective.alarms(list(self._history)))
        for alarm in alarms:
            self._say(f"ALARM at step {step}: {alarm}")
        if alarms and self._config.on_alarm == "stop":
            raise UserError(
                f"stopped at step {step} by an alarm ({alarms[0]}); look at {self._run_dir}, change the config or "
                "set engine.on_alarm=warn, and run again from the last checkpoint"
            )
        if alarms and self._config.on_alarm == "roll_back":
            self.alarm = alarms[0]

    def begin_roll_back(self, step: int, has_checkpoint: bool) -> str:
        """The reason; forgets it and what was seen. Raises UserError when going back cannot help any more."""
        reason, self.alarm = self.alarm, ""
        if not has_checkpoint or self._roll_backs >= self._config.max_roll_backs:
            why = (
                f"{self._roll_backs} roll-backs did not help"
                if has_checkpoint
                else "there is no checkpoint yet"
            )
            raise UserError(f"stopped at step {step}: {reason}, and {why}; lower engine.optimizer.lr")
        self._roll_backs += 1
        self.nonfinite_steps = 0
        self._history.clear()
        return reason

    def check_replicas(self, step: int, engines: Mapping[str, Any]) -> None:
        """Before a checkpoint: weights that every rank holds whole must have the same bits everywhere. Collective.

        Raises UserError naming the ranks. ZeRO-3 has no replicas.
        """
        if self._config.zero_stage == 3 or self._ranks.world == 1:
            return
        for name, engine in engines.items():
            sums = self._ranks.gather(masters.checksum(engine.module))
            if differing := [rank for rank, value in enumerate(sums) if value != sums[0]]:
                raise UserError(
                    f"step {step}: the {name} weights of ranks {differing} differ from rank 0's; nothing was saved. "
                    "Check those ranks' hardware and versions, then run again from the last checkpoint"
                )

    def state_dict(self) -> dict[str, int]:
        """Counters for the checkpoint."""
        return {"nonfinite_steps": self.nonfinite_steps, "roll_backs": self._roll_backs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.nonfinite_steps, self._roll_backs = state["nonfinite_steps"], state.get("roll_backs", 0)

    def _say(self, text: str) -> None:
        if self._ranks.is_first:
            say(f"[{self._objective.name}] {text}")
