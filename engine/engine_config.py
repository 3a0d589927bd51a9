"""Config of a training's run: length, parallelism, intervals of logs and checkpoints, responses to trouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from base.bounds import Amount, Count, Seconds, Seed, Share, Step, Steps, Weight
from base.config import ConfigError

Precision = Literal["fp32", "bf16_autocast", "bf16"]
WandbMode = Literal["disabled", "offline", "online"]
OnAlarm = Literal["warn", "stop", "roll_back"]
OnLossSpike = Literal["ignore", "skip", "roll_back"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon beside AdamW, with one shape of learning-rate schedule for both."""

    lr: float
    """Peak learning rate of AdamW."""
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (Jordan et al. 2024) updates matrices of repeated layers; AdamW updates embeddings, heads, vectors."""
    muon_lr: Weight = 0.02
    """Peak learning rate of Muon: an update has the spectral norm muon_lr * sqrt(max(1, rows / columns))."""
    muon_momentum: Share = 0.95
    """Momentum of Muon (Nesterov)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the decay from `lr` to `final_lr`; constant: no decay."""
    final_lr: Weight = 0.0
    """Learning rate from step `decay_end_step` on (cosine and linear)."""
    warmup_steps: Step = 0
    """Steps of linear warm-up from zero."""
    decay_start_step: Step = 0
    """Step at which the decay begins (cosine and linear)."""
    decay_end_step: Step | None = None
    """Step at which `final_lr` is reached; None: the run's last step."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Weight = 1e-8
    weight_decay: Weight = 0.0
    """Decoupled weight decay of matrices; biases, norms and tokens have none."""
    grad_clip: Weight = 0.0
    """Largest global gradient norm; 0: no clipping. Muon requires 0."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in [0, 1)")
        begin = max(self.decay_start_step, self.warmup_steps)
        if self.schedule != "constant" and self.decay_end_step is not None and self.decay_end_step <= begin:
            raise ConfigError(
                f"decay_end_step {self.decay_end_step} must come after decay_start_step {self.decay_start_step} and "
                f"warmup_steps {self.warmup_steps}"
            )
        if self.name == "muon" and (self.muon_lr <= 0 or not 0 <= self.muon_momentum < 1):
            raise ConfigError(
                f"muon_lr {self.muon_lr} must be above 0 and muon_momentum {self.muon_momentum} in [0, 1)"
            )
        if self.name == "muon" and self.grad_clip:
            # DeepSpeed measures the norm of the orthogonalised update, so clipping would only rescale the update.
            raise ConfigError(f"grad_clip is {self.grad_clip}; Muon's updates have a fixed norm, set it to 0")


@dataclass(frozen=True)
class EngineConfig:
    """The section `engine` of a training's config."""

    steps: Steps
    """Optimizer steps of the whole run."""
    optimizer: OptimizerConfig
    adversary_optimizer: OptimizerConfig | None = None
    """Optimizer of the discriminator; needed by objectives that have one."""
    precision: Precision = "fp32"
    """fp32; bf16_autocast: fp32 weights, bf16 matrix products; bf16: bf16 weights with fp32 masters."""
    tf32: bool = True
    """Whether GPUs may multiply fp32 numbers in TF32 (10 bits of mantissa). Scores are always computed without TF32."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage 1, 2 or 3 (0 has no guard against non-finite gradients). It may change on resume."""
    ema_decay: float | tuple[float, ...] = 0.9999
    """Decay of the averaged weights that are sampled and exported; 0: the last weights are. In a list, the first
    decay's average is sampled and exported; every other average is exported beside it as export_ema_DECAY.
    """
    seed: Seed = 0
    """Seed of the initial weights. The order of the data has a seed of its own."""
    deterministic: bool = False
    """Whether a repeated run gives equal bits on GPUs too, at some cost; on a CPU it always does. Only kernels with a
    deterministic backward pass are used. Trainings on pixels need GPU kernels that have none, and refuse this setting.
    """
    log_every_steps: Steps = 10
    checkpoint_every_steps: Steps = 1000
    keep_checkpoints: Count = 2
    async_checkpoint: bool = True
    """Whether the training goes on while a checkpoint is written. true: the training waits only for a copy to CPU
    memory (16 bytes a trained parameter and 4 for each average, divided by the number of ranks), and the checkpoint
    becomes complete at the step at which every rank has finished writing. false: the training waits for the disk and
    needs no such memory. The training always waits for the last checkpoint and for the one after a stop signal.
    """
    export_at_steps: tuple[Step, ...] = ()
    """Steps whose averaged weights are also exported, to export_step_XXXXXXXX beside the final export. AutoGuidance
    needs such an early model.
    """
    sample_every_steps: Step = 0
    """Steps between sample grids; 0: one grid at the end."""
    max_nonfinite_steps: Step = 5
    """The run stops after this many steps with a non-finite loss or gradient. No such step is applied."""
    on_alarm: OnAlarm = "warn"
    """What follows when the objective raises an alarm (a collapsed reconstruction, a discriminator that won) or
    max_nonfinite_steps is reached. warn: prints a line (non-finite steps end the run); stop: ends the run; roll_back:
    returns to the oldest checkpoint kept, but goes on with new data, so that the bad batches do not come again.
    """
    max_roll_backs: Amount = 3
    """Roll-backs before the next alarm stops the run."""
    on_loss_spike: OnLossSpike = "ignore"
    """What follows a step whose loss is above loss_spike_factor times the median of the last 100. skip: the step is not
    taken, its batch is kept, and the run stops after max_nonfinite_steps in a row; roll_back: as for alarms. Both cost
    time: every step then waits for its loss before its last backward pass.
    """
    loss_spike_factor: float = 3.0
    hang_timeout_s: Seconds = 1800.0
    """Seconds without progress after which a rank is named and the run ends, to be started again; 0: no limit."""
    wandb: WandbMode = "offline"

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """Decays of all averages; the first is sampled and exported. Empty: the last weights take its place."""
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
