"""The training loop for everything that learns: one function, composed of an objective and a batch source."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint, communication, files, masters
from engine.config import ConfigError, UserError
from engine.distributed import Ranks
from engine.ema import Ema
from engine.engine_config import EngineConfig
from engine.guard import Guard, out_of_memory
from engine.logs import RunLog, seconds_text
from engine.objective import Batch, BatchSource, LossOutput, Objective
from engine.schedule import OptimizerConfig, learning_rate, set_learning_rate
from engine.spans import Spans, peak_flops
from engine.watchdog import Watchdog
from engine.window import Window

EXPORT = "export"
CHECKPOINTS = "checkpoints"


def train(
    objective: Objective,
    source: BatchSource,
    config: EngineConfig,
    *,
    run_dir: Path,
    resolved: Mapping[str, Any],
    ranks: Ranks,
) -> Path:
    """Runs or resumes a training and returns the folder of its export (EMA weights).

    `resolved` is the whole run's config, saved as config.json. The same command again continues from the newest
    checkpoint, bit for bit on the same number of ranks; a finished run only returns.
    """
    return _Run(objective, source, config, run_dir, resolved, ranks).train()


class _Run:
    """State of one training. Steps count finished optimizer steps."""

    def __init__(
        self,
        objective: Objective,
        source: BatchSource,
        config: EngineConfig,
        run_dir: Path,
        resolved: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.spans = Spans(ranks.device)
        communication.time_collectives(self.spans)
        ranks = dataclasses.replace(ranks, waits=lambda: self.spans("waiting"))
        self.objective, self.source, self.config, self.ranks = objective, source, config, ranks
        self.run_dir = run_dir
        objective.to(ranks.device)
        self.accumulation_steps = -(-source.num_streams // ranks.world)
        self.engines = {"main": self._engine(objective.model, objective.loss, config.optimizer)}
        if objective.adversary is not None:
            if config.adversary_optimizer is None:
                raise ConfigError(f"{objective.name} trains a discriminator: set engine.adversary_optimizer")
            if config.zero_stage == 3:  # its weights are read outside its own engine's forward
                raise ConfigError(
                    f"{objective.name} trains a discriminator: engine.zero_stage must be 1 or 2"
                )
            self.engines["adversary"] = self._engine(
                objective.adversary, objective.adversary_loss, config.adversary_optimizer
            )
        self.ema = Ema(self.engines["main"], config.ema_decay) if config.ema_decay else None
        self.step = 0
        self.guard = Guard(objective, config, run_dir, ranks)
        self._resume()
        self.log: RunLog | None = None
        if ranks.is_first:
            files.write_json(run_dir / "config.json", dict(resolved))
            self.log = RunLog(run_dir, objective.name, resolved, self.step, config.wandb)
        self._stop_requested = False
        self._window = Window(ranks, peak_flops(ranks.device))

    def train(self) -> Path:
        """Steps until the end or a stop signal; then the export."""
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._request_stop)
        if self.log and self.step:
            self.log.line(f"resumed at step {self.step}/{self.config.steps}")
        watchdog = None
        if self.config.hang_timeout_s:
            watchdog = Watchdog(
                self.ranks, self.config.hang_timeout_s, lambda: (self.step, self.spans.place), self.run_dir
            )
        try:
            export = self._steps()
        except RuntimeError as error:
            if explained := out_of_memory(error, self.step, self.spans.failed_in):
                raise explained from error
            raise
        if watchdog:
            watchdog.close()
        if self.log:
            self.log.close()
        self.source.close()
        for engine in self.engines.values():
            engine.destroy()
        return export

    def _steps(self) -> Path:
        begin_s = time.monotonic()
        start_s, start_step = begin_s, self.step
        while self.step < self.config.steps:
            self._train_step()
            if self.step % self.config.log_every_steps == 0 or self.step == self.config.steps:
                rate = (self.step - start_step) / (time.monotonic() - start_s)
                self._write_metrics((self.config.steps - self.step) / rate)
            if self.guard.alarm:
                self._roll_back()
                start_s, start_step = time.monotonic(), self.step
                continue
            if self.config.sample_every_steps and self.step % self.config.sample_every_steps == 0:
                with self.spans("samples"):
                    self._write_samples()
            if (
                self.step in self.config.export_at_steps
            ):  # before a checkpoint: a resumed run would not come here
                self._export(f"{EXPORT}_step_{self.step:08d}")
            stop = self._stop_agreed()
            if stop or self.step % self.config.checkpoint_every_steps == 0 or self.step == self.config.steps:
                with self.spans("checkpoint"):
                    self._save()
            if stop and self.step < self.config.steps:
                raise UserError(
                    f"stopped by a signal at step {self.step}, saved; run the same command to go on"
                )
        self._write_samples()
        export = self._export(EXPORT)
        if self.log:
            self.log.line(
                f"finished {self.step} steps in {seconds_text(time.monotonic() - begin_s)}: {export}"
            )
        return export

    def _engine(
        self, module: torch.nn.Module, loss: Callable[[Any, int], LossOutput], optimizer: OptimizerConfig
    ) -> Any:
        return masters.build_engine(
            masters.Forward(module, loss, self.config.precision),
            optimizer,
            zero_stage=self.config.zero_stage,
            precision=self.config.precision,
            accumulation_steps=self.accumulation_steps,
        )

    def _train_step(self) -> None:
        """One global step: one pack of every stream, the loss divided by the global count."""
        begin_s = time.monotonic()
        self.spans.begin_step()
        with self.spans("data"):
            batches: list[Batch] = [batch.to(self.ranks.device) for batch in self.source.next_step()]
        count, further = self._global_counts(batches)
        # A rank with fewer streams than others runs its last pack again at weight 0: collectives must match.
        weights = [1.0] * len(batches) + [0.0] * (self.accumulation_steps - len(batches))
        batches += [batches[-1]] * (self.accumulation_steps - len(batches))
        for name, optimizer in self._optimizers():
            groups = self.engines[name].optimizer.param_groups
            set_learning_rate(groups, optimizer, self.step, self.config.steps)
        skipped_before = self._skipped_steps()
        adversarial = self.objective.adversary_active(self.step)
        losses, spike = [], None
        for batch, weight in zip(batches, weights, strict=True):
            output, loss = self._forward("main", batch, weight, count, further)
            losses.append(output.loss_sum.detach() * weight)
            if len(losses) == len(batches):
                spike = self._spike(losses, count)
            self._backward("main", loss, spoiled=spike is not None)
            self._window.add("", output, weight)
            for name, term in output.further.items():
                self._window.add(f"{name}_", LossOutput(term.loss_sum), weight)
            if adversarial:
                adversary_output, loss = self._forward("adversary", output.adversary_batch, weight, count, {})
                self._backward("adversary", loss, spoiled=spike is not None)
                self._window.add("adversary_", adversary_output, weight)
        self._window.close_step(
            {
                "": count,
                "adversary_": count if adversarial else 0.0,
                **{f"{name}_": float(value) for name, value in further.items()},
            },
            self.source.metrics(),
            time.monotonic() - begin_s,
        )
        if spike is not None:
            self.guard.spike(self.step, spike, batches)
        elif self._skipped_steps() > skipped_before:
            self.guard.nonfinite(self.step, batches)
        elif self.ema is not None:
            self.ema.update(self.engines["main"], self.step)
        self.step += 1

    def _global_counts(self, batches: list[Batch]) -> tuple[float, dict[str, float]]:
        """Units of the loss, and of its further terms, over this step's micro-batches on all ranks."""
        counts = sum(self.objective.count(batch) for batch in batches)
        further = [self.objective.further_counts(batch) for batch in batches]
        names = sorted(further[0])
        total, *totals = self.ranks.sum([counts, *(sum(part[name] for part in further) for name in names)])
        return total, dict(zip(names, totals, strict=True))

    def _forward(
        self, name: str, batch: Any, weight: float, count: float, further: Mapping[str, float]
    ) -> tuple[LossOutput, torch.Tensor]:
        """What the objective gives, and its share in the step's loss."""
        scale = weight * self.ranks.world  # DeepSpeed averages over ranks
        with self.spans("forward"):
            output: LossOutput = self.engines[name](batch, self.step)
            loss = output.loss_sum * (scale / max(count, 1.0))
            for key, term in output.further.items():
                loss = loss + term.loss_sum * (term.weight * scale / max(further[key], 1.0))
        return output, loss

    def _backward(self, name: str, loss: torch.Tensor, *, spoiled: bool) -> None:
        """`spoiled`: the step is not to be taken. DeepSpeed takes none whose gradients are not finite."""
        with self.spans("backward"):
            self.engines[name].backward(loss * math.nan if spoiled else loss, scale_wrt_gas=False)
        with self.spans("optimizer"):
            self.engines[name].step()

    def _spike(self, losses: list[torch.Tensor], count: float) -> float | None:
        """The step's loss where it is a spike; None: it is not, or nobody asks. Collective; waits for the device."""
        if self.config.on_loss_spike == "ignore":
            return None
        total = float(self.ranks.sum_on_device(torch.stack(losses).sum()))
        mean = total / max(count, 1.0)
        return mean if self.guard.is_spike(mean) else None

    def _optimizers(self) -> list[tuple[str, OptimizerConfig]]:
        pairs = [("main", self.config.optimizer), ("adversary", self.config.adversary_optimizer)]
        return [
            (name, optimizer) for name, optimizer in pairs if name in self.engines and optimizer is not None
        ]

    def _skipped_steps(self) -> int:
        """Steps that DeepSpeed refused for a non-finite gradient: the same number on every rank."""
        return sum(int(engine.skipped_steps) for engine in self.engines.values())

    def _write_metrics(self, eta_s: float) -> None:
        values = self._window.read() | self.spans.read()
        norm = self.engines["main"].get_global_grad_norm()
        values.update(
            step=self.step,
            lr=learning_rate(self.config.optimizer, self.step - 1, self.config.steps),
            grad_norm=float(norm) if norm is not None else 0.0,
            nonfinite_steps=self.guard.nonfinite_steps,
            memory_gib=self.ranks.peak_memory_gib(),
        )
        values = self.ranks.gather(values)[0]  # rates differ between ranks; decisions must not
        if self.log:
            self.log.metrics(values, self.config.steps, eta_s)
        self.guard.look(self.step, values)

    def _roll_back(self) -> None:
        """Weights, optimizers, averages and step of the oldest checkpoint kept; data from where they are now.

        The checkpoint takes over the data's position, so that a restart does not meet the bad batches again.
        """
        alarm_step = self.step
        complete = checkpoint.agreed(self.run_dir / CHECKPOINTS, self.ranks)
        reason = self.guard.begin_roll_back(alarm_step, bool(complete))
        state = self._load(complete[0])
        self._window = Window(self.ranks, peak_flops(self.ranks.device))
        state = {**state, "data": self._data_state(), **self.guard.state_dict()}
        checkpoint.keep_alone(complete[0], state, self.ranks)
        if self.log:
            self.log.rewind(self.step)
            self.log.line(f"rolled back from step {alarm_step} to step {self.step}: {reason}")

    def _averaged(self) -> Any:
        """Context in which the model holds the EMA weights."""
        own = masters.shards(self.engines["main"])
        return masters.swapped(self.engines["main"], self.ema.shadow if self.ema else own)

    def _write_samples(self) -> None:
        """Every rank computes under ZeRO-3 (forward is collective there), else only the first."""
        self.objective.model.eval()
        with self._averaged(), masters.gathered(self.engines["main"]), torch.no_grad():
            grid = None
            if self.ranks.is_first or self.config.zero_stage == 3:
                with masters.autocast(self.config.precision, self.ranks.device):
                    grid = self.objective.samples()
            if self.log and grid is not None:
                self.log.samples(self.step, grid)
            self.ranks.barrier()
        self.objective.model.train()

    def _save(self) -> None:
        self.guard.check_replicas(self.step, self.engines)
        checkpoint.save(
            self.run_dir / CHECKPOINTS,
            step=self.step,
            engines=self.engines,
            ema=self.ema,
            state={
                "data": self._data_state(),
                "fingerprints": dict(self.objective.fingerprints()),
                **self.guard.state_dict(),
            },
            ranks=self.ranks,
            keep=self.config.keep_checkpoints,
        )

    def _data_state(self) -> dict[str, Any]:
        """The data's position on all ranks. Collective."""
        sources = self.ranks.gather(self.source.state_dict())
        return {**sources[0], "streams": {k: v for state in sources for k, v in state["streams"].items()}}

    def _resume(self) -> None:
        complete = checkpoint.agreed(self.run_dir / CHECKPOINTS, self.ranks)
        if complete:
            state = self._load(complete[-1])
            self.guard.load_state_dict(state)
            self.source.load_state_dict(state["data"])

    def _load(self, directory: Path) -> Mapping[str, Any]:
        """Everything but the data's position, from one checkpoint."""
        state = checkpoint.load(
            directory,
            engines=self.engines,
            ema=self.ema,
            fingerprints=self.objective.fingerprints(),
            ranks=self.ranks,
        )
        self.step = state["step"]
        return state

    def _export(self, name: str) -> Path:
        export = self.run_dir / name
        with self._averaged(), masters.gathered(self.engines["main"]):
            if self.ranks.is_first:
                with files.directory(export) as temporary:
                    self.objective.export(temporary)
            self.ranks.barrier()
        return export

    def _request_stop(self, _signal: int, _frame: object) -> None:
        self._stop_requested = True

    def _stop_agreed(self) -> bool:
        """Launchers signal ranks one after another: save together, at the same step."""
        return self.ranks.sum([float(self._stop_requested)])[0] > 0
