"""The training loop for everything that learns: one function, composed of an objective and a batch source."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import files
from base.config import StoppedError, UserError, counted
from base.objective import Batch, BatchSource, Evaluation, Objective
from base.redaction import redact, redacted
from base.terminal import say
from base.tf32 import allow_tf32
from engine import communication, job_endings, run_lock
from engine.averages import Averages
from engine.checkpoint import Checkpoints
from engine.checkpoint_folder import CHECKPOINTS, EXPORT
from engine.config_changes import changes
from engine.distributed import Ranks
from engine.ema import Ema
from engine.engine_config import EngineConfig
from engine.guard import Guard, out_of_memory
from engine.logs import EventKind, RunLog, seconds_text
from engine.metric_window import Window
from engine.peers import notice_vanished_peers
from engine.schedule import learning_rate
from engine.spans import Spans, peak_flops
from engine.step import Stepper
from engine.system import SystemMeter, combine
from engine.watchdog import Watchdog

STDERR = 2


def train(
    objective: Objective,
    source: BatchSource,
    config: EngineConfig,
    *,
    run_dir: Path,
    resolved: Mapping[str, Any],
    ranks: Ranks,
    evaluation: Evaluation | None = None,
) -> Path:
    """Runs or resumes a training and returns the folder of its export (EMA weights).

    `resolved` is the whole run's config, saved as config.json. A repeated command continues from the newest undamaged
    checkpoint on any number of ranks; on an equal number the result is equal bit for bit. A finished run only returns.
    Raises UserError: another training runs in `run_dir`; no checkpoint can be loaded; the guard stops the run; the
    export cannot be written. Raises StoppedError: a signal stopped the run, and its last step is saved.
    """
    with run_lock.held(run_dir, ranks, lambda text: say(f"[{objective.name}] {text}")):
        run = _Run(objective, source, config, run_dir, resolved, ranks, evaluation)
        try:
            return run.train()
        except BaseException as error:  # written to events.jsonl, then raised again
            if run.log:
                run.log.ended_by(job_endings.cause(error), run.step)
            raise


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
        evaluation: Evaluation | None = None,
    ) -> None:
        self.spans = Spans(ranks.device)
        communication.time_collectives(self.spans)
        ranks = dataclasses.replace(ranks, waits=lambda: self.spans("waiting"))
        self.objective, self.source, self.config, self.ranks = objective, source, config, ranks
        self.run_dir, self.evaluation = run_dir, evaluation
        allow_tf32(config.tf32)
        objective.to(ranks.device)
        self.stepper = Stepper(objective, config, ranks, self.spans, source.num_streams)
        self.engines = self.stepper.engines
        self.ema = Ema(self.engines["main"], config.ema_decays) if config.ema_decays else None
        self.averages = Averages(objective, self.engines["main"], self.ema, config, ranks)
        self.step = 0
        self.log: RunLog | None = None
        self._early: list[tuple[EventKind, int, str]] = []
        self.checkpoints = Checkpoints(
            run_dir / CHECKPOINTS,
            self.engines,
            self.ema,
            ranks,
            keep=config.keep_checkpoints,
            say=self._event,
        )
        self.guard = Guard(objective, config, run_dir, ranks, self._event)
        self._resume(resolved)
        if ranks.is_first:
            files.write_json(run_dir / "config.json", redacted(resolved))
            self.log = RunLog(run_dir, objective.name, resolved, self.step, config.wandb)
            for event in self._early:
                self.log.event(*event)
            job_endings.witness(self._write_down)
        self._stop_requested = self._is_interrupted = False
        self._watchdog: Watchdog | None = None
        self._window = Window(ranks, peak_flops(ranks.device))
        self._system = SystemMeter(ranks.device, run_dir if ranks.is_first else None)

    def train(self) -> Path:
        """Trains until the last step, then exports. Raises StoppedError: a stop signal came first."""
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._request_stop)
        if (
            signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        ):  # a shell makes background commands ignore SIGINT
            signal.signal(signal.SIGINT, self._interrupt)
        ranks = f"{counted(self.ranks.world, 'rank')} on {self.ranks.device.type}"
        how = f"{ranks}, ZeRO-{self.config.zero_stage}, {self.config.precision}"
        how += f", {counted(self.source.num_streams, 'pack')} a step"
        if self.step:
            self._event("resume", self.step, f"resumed at step {self.step}/{self.config.steps}: {how}")
        else:
            self._event("start", 0, f"{self.config.steps} steps: {how}")
        if self.config.hang_timeout_s:
            self._watchdog = Watchdog(
                self.ranks, self.config.hang_timeout_s, lambda: (self.step, self.spans.place), self.run_dir
            )
        notice_vanished_peers()  # once more: the watchdog and DeepSpeed have opened connections
        try:
            export = self._steps()
        except RuntimeError as error:
            if explained := out_of_memory(error, self.step, self.spans.failed_in):
                raise explained from error
            raise
        if self._watchdog:
            self._watchdog.close()
        self.source.close()
        for engine in self.engines.values():
            engine.destroy()
        if self.log:
            self.log.close()
        return export

    def _steps(self) -> Path:
        begin_s = time.monotonic()
        start_s, start_step = begin_s, self.step
        if self.step:  # the process before this one may have ended before this step's export and scores
            if failed := self._export_early(is_redone=False):
                raise UserError(f"{failed}; make room and run the same command again")
            self._evaluate_if_due()
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
            # Export before the checkpoint: a run that resumes at a later step would not export this one.
            failed = self._export_early()
            stop = self._stop_agreed()
            last = stop or bool(failed) or self.step == self.config.steps
            if last or self.step % self.config.checkpoint_every_steps == 0:
                with self.spans("checkpoint"):
                    self._save(last)
            if failed:
                raise UserError(
                    f"{failed}; step {self.step} is saved: make room and run the same command again"
                )
            if stop and self.step < self.config.steps:
                why = "interrupted" if self._is_interrupted else "stopped by a signal"
                raise StoppedError(f"{why} at step {self.step}, saved; run the same command to go on")
            self._evaluate_if_due()  # after the checkpoint: an evaluation may take hours, or fail
        export = self._export(EXPORT, self.config.ema_decays[0] if self.ema else None)
        for decay in self.config.ema_decays[1:]:
            self._export(f"{EXPORT}_ema_{decay}", decay)
        spent = seconds_text(time.monotonic() - begin_s)
        self._event("finish", self.step, f"finished {self.step} steps in {spent}: {export}")
        return export

    def _write_down(self, error: BaseException) -> None:
        if self.log:
            self.log.ended_by(error, self.step)

    def _event(self, kind: EventKind, step: int, text: str) -> None:
        """Prints a line for people and logs the event. Events before the log is open wait in `_early`."""
        if not self.ranks.is_first:
            return
        say(f"[{self.objective.name}] {redact(text)}")
        if self.log:
            self.log.event(kind, step, text)
        else:
            self._early.append((kind, step, text))

    def _train_step(self) -> None:
        """One global step, of one pack from every stream. The guard handles a step that was not taken."""
        begin_s = time.monotonic()
        self.spans.begin_step()
        with self.spans("data"):
            batches: list[Batch] = [batch.to(self.ranks.device) for batch in self.source.next_step()]
        outcome = self.stepper.take(batches, self.step, self._window, self.guard.is_spike)
        self._window.close_step(outcome.counts, self.source.metrics(), time.monotonic() - begin_s)
        if outcome.spike is not None:
            self.guard.spike(self.step, outcome.spike, batches)
        elif not outcome.is_taken:
            self.guard.nonfinite(self.step, batches)
        elif self.ema is not None:
            self.ema.update(self.engines["main"], self.step)
        self.step += 1

    def _write_metrics(self, eta_s: float) -> None:
        values = self._window.read() | self.spans.read()
        norm = self.engines["main"].get_global_grad_norm()
        values.update(
            step=self.step,
            lr=learning_rate(self.config.optimizer, self.step - 1, self.config.steps),
            grad_norm=float(norm) if norm is not None else 0.0,
            nonfinite_steps=self.guard.nonfinite_steps,
            memory_gib=self.ranks.peak_memory_gib(),
            **combine(self.ranks.gather(self._system.read())),
        )
        values = self.ranks.gather(values)[0]  # rates differ between ranks, but all must decide alike
        if self.log:
            self.log.metrics(values, self.config.steps, eta_s)
        self.guard.look(self.step, values)

    def _roll_back(self) -> None:
        """Restores weights, optimizers, averages and step of the oldest checkpoint kept; the data go on from here.

        The present position of the data is written into that checkpoint, so that a restart skips the bad batches, too.
        """
        alarm_step = self.step
        self.checkpoints.finish()
        reason = self.guard.begin_roll_back(alarm_step, bool(self.checkpoints.complete()))
        loaded = self.checkpoints.load(self.objective.fingerprints(), oldest=True)
        assert loaded is not None
        directory, state = loaded
        self.step = state["step"]
        self._window = Window(self.ranks, peak_flops(self.ranks.device))
        state = {**state, "data": self._data_state(), **self.guard.state_dict()}
        self.checkpoints.keep_alone(directory, state)
        if self.log:
            self.log.rewind(self.step)
        self._event(
            "roll_back", alarm_step, f"rolled back from step {alarm_step} to step {self.step}: {reason}"
        )

    def _write_samples(self) -> None:
        grid = self.averages.samples()
        if self.log and grid is not None:
            self.log.samples(self.step, grid)

    def _evaluate_if_due(self) -> None:
        evaluation = self.evaluation
        if evaluation is None or (self.step % evaluation.every_steps and self.step != self.config.steps):
            return
        if not self.ranks.gather(self.log is not None and self.log.has_scores(self.step))[0]:
            with self.spans("checkpoint"):
                self.checkpoints.finish()
            with self.spans("evaluation"):
                self._evaluate(evaluation)

    def _evaluate(self, evaluation: Evaluation) -> None:
        begin_s = time.monotonic()
        with self._watchdog.off() if self._watchdog else contextlib.nullcontext(), self.averages.whole():
            scores = evaluation.run(self.step)
        if self.log:
            self.log.scores(self.step, scores)
            found = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            spent = seconds_text(time.monotonic() - begin_s)
            self._event("evaluation", self.step, f"evaluated step {self.step} in {spent}: {found}")

    def _save(self, last: bool) -> None:
        """Saves a checkpoint of this step. `last`: waits for it and raises UserError if it fails."""
        self.guard.check_replicas(self.step, self.engines)
        state = {
            "step": self.step,
            "next_lr": self._next_lr(),
            "data": self._data_state(),
            "fingerprints": dict(self.objective.fingerprints()),
            **self.guard.state_dict(),
        }
        background = self.config.async_checkpoint and not last
        self.checkpoints.save(state, background=background, required=last)

    def _data_state(self) -> dict[str, Any]:
        """The data's position on all ranks. Collective."""
        sources = self.ranks.gather(self.source.state_dict())
        return {**sources[0], "streams": {k: v for state in sources for k, v in state["streams"].items()}}

    def _resume(self, resolved: Mapping[str, Any]) -> None:
        """Continues from the newest checkpoint, if there is one, and reports the changes of the config."""
        path = self.run_dir / "config.json"  # the last start wrote it
        before = self.ranks.gather(files.read_json(path) if self.ranks.is_first and path.exists() else None)[
            0
        ]
        changed = changes(before, redacted(resolved)) if before else []
        loaded = self.checkpoints.load(self.objective.fingerprints(), changed)
        if loaded is None:
            return
        _, state = loaded
        self.step = state["step"]
        self.guard.load_state_dict(state)
        self.source.load_state_dict(state["data"])
        for change in changed:
            self._event("change", self.step, f"changed since the last start: {change}")
        was, now = state.get("next_lr"), self._next_lr()
        if was not in (None, now):
            text = f"the learning rate of the next step is {now:.3g}, and would have been {was:.3g}"
            self._event("change", self.step, f"{text} (engine.optimizer and engine.steps set the schedule)")
        if self.config.steps < self.step:
            text = f"engine.steps is {self.config.steps}, the newest checkpoint is of step {self.step}"
            self._event("warning", self.step, f"{text}: nothing is trained, and that checkpoint is exported")

    def _next_lr(self) -> float:
        """The learning rate of the next step under the present config."""
        return learning_rate(self.config.optimizer, self.step, self.config.steps)

    def _export_early(self, *, is_redone: bool = True) -> str:
        """Writes the export that `export_at_steps` asks of this step. Returns why that failed, or ''. Collective."""
        path = self.run_dir / f"{EXPORT}_step_{self.step:08d}"
        if self.step not in self.config.export_at_steps:
            return ""
        if not is_redone and self.ranks.gather(path.exists())[0]:
            return ""
        return self.averages.export(path, None)

    def _export(self, name: str, decay: float | None) -> Path:
        """Exports the last step, whose checkpoint is saved already. Raises UserError: the export cannot be written."""
        if name == EXPORT:
            self._write_samples()
        if failed := self.averages.export(self.run_dir / name, decay):
            raise UserError(f"{failed}; step {self.step} is saved: make room and run the same command again")
        return self.run_dir / name

    def _request_stop(self, _signal: int, _frame: object) -> None:
        self._stop_requested = True

    def _interrupt(self, _signal: int, _frame: object) -> None:
        """Handles Ctrl-C: the first one requests a stop; a second one ends this process at once."""
        self._stop_requested = self._is_interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.ranks.is_first:
            text = f"interrupted at step {self.step}: saving after it"
            text += f"; Ctrl-C again ends at once, then the same command goes on at step {self.checkpoints.newest}"
            with contextlib.suppress(OSError):  # not `print`: the signal may have interrupted one
                os.write(STDERR, f"[{self.objective.name}] {text}\n".encode())

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop. Commits a checkpoint that every rank has written. Collective.

        Launchers signal ranks one after another; this sum makes all ranks stop, and save, at one step.
        """
        is_written = float(self.checkpoints.is_written)
        num_stops, num_written = self.ranks.sum([float(self._stop_requested), is_written])
        if num_written == self.ranks.world:
            with self.spans("checkpoint"):
                self.checkpoints.commit()
        return num_stops > 0
