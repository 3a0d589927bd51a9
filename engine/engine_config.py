"""How a training runs: length, parallelism, rhythm of logs and checkpoints, and what follows trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from base.bounds import Amount, Count, Seconds, Seed, Step, Steps
from base.config import ConfigError
from engine.deepspeed_engine import Precision
from engine.logs import WandbMode
from engine.schedule import OptimizerConfig

OnAlarm = Literal["warn", "stop", "roll_back"]
OnLossSpike = Literal["ignore", "skip", "roll_back"]


@dataclass(frozen=True)
class EngineConfig:
    """How long, how often, how parallel."""

    steps: Steps
    """Optimizer steps of the whole run."""
    optimizer: OptimizerConfig
    adversary_optimizer: OptimizerConfig | None = None
    """Optimizer of the discriminator; needed by objectives that have one."""
    precision: Precision = "fp32"
    """fp32; bf16_autocast: fp32 weights, bf16 matrix products; bf16: bf16 weights with fp32 masters."""
    tf32: bool = True
    """Whether GPUs may multiply fp32 numbers in TF32 (10 bits of mantissa). Scores are computed without, always."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage 1, 2 or 3 (0 has no guard against non-finite gradients). It may change on resume."""
    ema_decay: float | tuple[float, ...] = 0.9999
    """Decay of the averaged weights that are sampled and exported; 0 keeps the last weights. Of a list, the first is
    sampled and exported, every other one exported beside it as export_ema_DECAY.
    """
    seed: Seed = 0
    """Seed of the initial weights. The order of the data has its own."""
    deterministic: bool = False
    """Whether the same run gives the same bits on GPUs too, at some cost; on a CPU it does anyway. Only kernels with a
    deterministic backward pass are taken. Trainings on pixels have none for all they do on a GPU, and refuse it.
    """
    log_every_steps: Steps = 10
    checkpoint_every_steps: Steps = 1000
    keep_checkpoints: Count = 2
    async_checkpoint: bool = True
    """Whether the training goes on while a checkpoint is written: it waits only for a copy in CPU memory (16 bytes a
    trained parameter and 4 for each average, divided by the number of ranks), and the checkpoint counts from the step
    at which every rank has finished. false: it waits for the disk and needs no such memory. The last checkpoint and
    the one after a stop signal are always waited for.
    """
    export_at_steps: tuple[Step, ...] = ()
    """Steps whose averaged weights are also exported, to export_step_XXXXXXXX beside the last ones' export: what guides
    by an early model (AutoGuidance) needs.
    """
    sample_every_steps: Step = 0
    """Steps between sample grids; 0: only at the end."""
    max_nonfinite_steps: Step = 5
    """The run stops after this many steps with a non-finite loss or gradient (none of them is applied)."""
    on_alarm: OnAlarm = "warn"
    """What follows when the objective raises an alarm (a collapsed reconstruction, a discriminator that won) or
    max_nonfinite_steps is reached. warn: a line (and, for non-finite steps, the end); stop; roll_back: to the oldest
    checkpoint kept, on the data that come next, so that the same batches are not met again.
    """
    max_roll_backs: Amount = 3
    """The alarm after so many stops the run."""
    on_loss_spike: OnLossSpike = "ignore"
    """What follows a step whose loss is above loss_spike_factor times the median of the last 100. skip: it is not
    taken, its batch is kept, and after max_nonfinite_steps in a row the run stops; roll_back: as for alarms. Neither
    is free: the loss of every step is then waited for before its backward pass.
    """
    loss_spike_factor: float = 3.0
    hang_timeout_s: Seconds = 1800.0
    """A rank that has not moved for so long is named and the run ends, to be started again; 0: never."""
    wandb: WandbMode = "offline"

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decays of all averages, the one to sample and export first; none: the last weights are."""
        decays = self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)
        return tuple(decay for decay in decays if decay)

    def __post_init__(self) -> None:
        if len(set(self.ema_decays)) < len(self.ema_decays) or not all(0 < d < 1 for d in self.ema_decays):
            raise ConfigError(f"ema_decay is {self.ema_decay}; name decays between 0 and 1, each once")
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"zero_stage is {self.zero_stage}; choose 1, 2 or 3")
        if "roll_back" in (self.on_alarm, self.on_loss_spike) and self.keep_checkpoints < 2:
            raise ConfigError(
                "roll_back needs keep_checkpoints of at least 2: the newest may hold what went wrong"
            )
        if self.loss_spike_factor <= 1:
            raise ConfigError(f"loss_spike_factor is {self.loss_spike_factor}; it must be above 1")
        if self.hang_timeout_s < 0:
            raise ConfigError(f"hang_timeout_s is {self.hang_timeout_s}; give seconds, or 0 for no limit")
        if any(not 1 <= step <= self.steps for step in self.export_at_steps):
            raise ConfigError(f"export_at_steps {self.export_at_steps}: give steps from 1 to {self.steps}")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")
