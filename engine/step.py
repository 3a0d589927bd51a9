"""One global step: a micro-batch of every stream through the engines, the loss divided by its global count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from base.config import ConfigError
from base.objective import Batch, LossOutput, Objective
from engine import deepspeed_engine
from engine.distributed import Ranks
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.metric_window import Window
from engine.schedule import set_learning_rate
from engine.spans import Spans


@dataclass(frozen=True)
class Outcome:
    """The result of a step, equal on every rank."""

    counts: Mapping[str, float]
    """Global units of the loss and of its further terms, by the prefix of their metrics."""
    is_taken: bool
    """Whether the weights moved: DeepSpeed refuses a step whose gradients are not finite."""
    spike: float | None
    """The mean loss, if the step was not taken because of a loss spike; else None."""


class Stepper:
    """Owns the DeepSpeed engines: `main`, and where the objective has a discriminator, `adversary`."""

    def __init__(
        self, objective: Objective, config: EngineConfig, ranks: Ranks, spans: Spans, num_streams: int
    ) -> None:
        """Raises ConfigError: a discriminator without an optimizer, or under ZeRO-3."""
        self._objective, self._config, self._ranks, self._spans = objective, config, ranks, spans
        self._accumulation_steps = -(-num_streams // ranks.world)
        self._optimizers = {"main": config.optimizer}
        self.engines = {"main": self._engine(objective.model, objective.loss, config.optimizer)}
        if objective.adversary is not None:
            if config.adversary_optimizer is None:
                raise ConfigError(f"{objective.name} trains a discriminator: set engine.adversary_optimizer")
            if config.zero_stage == 3:  # the loss reads its weights outside its engine's forward
                raise ConfigError(
                    f"{objective.name} trains a discriminator: engine.zero_stage must be 1 or 2"
                )
            self._optimizers["adversary"] = config.adversary_optimizer
            self.engines["adversary"] = self._engine(
                objective.adversary, objective.adversary_loss, config.adversary_optimizer
            )

    def take(
        self, batches: Sequence[Batch], step: int, window: Window, is_spike: Callable[[float], bool]
    ) -> Outcome:
        """Takes step number `step` with this rank's micro-batches, which lie on its device. Collective.

        Metrics go to `window`. `is_spike`: whether a step's mean loss is a spike; unused if engine.on_loss_spike is
        ignore.
        """
        count, further = self._global_counts(batches)
        # A rank with fewer streams than others runs its last pack again at weight 0: collectives must match.
        num_repeated = self._accumulation_steps - len(batches)
        weights = [1.0] * len(batches) + [0.0] * num_repeated
        batches = [*batches, *[batches[-1]] * num_repeated]
        for name, engine in self.engines.items():
            set_learning_rate(engine.optimizer.param_groups, self._optimizers[name], step, self._config.steps)
        skipped_before = self._skipped_steps()
        adversarial = self._objective.adversary_active(step)
        losses: list[torch.Tensor] = []
        spike = None
        for batch, weight in zip(batches, weights, strict=True):
            output, loss = self._forward("main", step, batch, weight, count, further)
            losses.append(output.loss_sum.detach() * weight)
            if len(losses) == len(batches) and self._config.on_loss_spike != "ignore":
                mean = self._mean(losses, count)
                spike = mean if is_spike(mean) else None
            self._backward("main", loss, spoiled=spike is not None)
            window.add("", output, weight)
            for name, term in output.further.items():
                window.add(f"{name}_", LossOutput(term.loss_sum), weight)
            if adversarial:
                adversary_batch = output.adversary_batch
                output, loss = self._forward("adversary", step, adversary_batch, weight, count, {})
                self._backward("adversary", loss, spoiled=spike is not None)
                window.add("adversary_", output, weight)
        counts = {"": count, "adversary_": count if adversarial else 0.0}
        counts |= {f"{name}_": value for name, value in further.items()}
        return Outcome(counts, self._skipped_steps() == skipped_before, spike)

    def _engine(
        self, module: torch.nn.Module, loss: Callable[[Any, int], LossOutput], optimizer: OptimizerConfig
    ) -> Any:
        return deepspeed_engine.build_engine(
            deepspeed_engine.Forward(module, loss, self._config.precision),
            optimizer,
            zero_stage=self._config.zero_stage,
            precision=self._config.precision,
            accumulation_steps=self._accumulation_steps,
        )

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Units of the loss, and those of its further terms by name, in this step's micro-batches on all ranks."""
        counts = sum(self._objective.count(batch) for batch in batches)
        further = [self._objective.further_counts(batch) for batch in batches]
        names = sorted(further[0])
        total, *totals = self._ranks.sum([counts, *(sum(part[name] for part in further) for name in names)])
        return total, dict(zip(names, totals, strict=True))

    def _forward(
        self, name: str, step: int, batch: Any, weight: float, count: float, further: Mapping[str, float]
    ) -> tuple[LossOutput, torch.Tensor]:
        """The objective's output for one micro-batch, and the micro-batch's share of the step's loss."""
        scale = weight * self._ranks.world  # DeepSpeed averages over ranks
        with self._spans("forward"):
            sums: dict[str, torch.Tensor]
            output: LossOutput
            sums, output = self.engines[name](batch, step)
            loss = sums[""] * (scale / max(count, 1.0))
            for key, term in output.further.items():
                loss = loss + sums[key] * (term.weight * scale / max(further[key], 1.0))
        return output, loss

    def _backward(self, name: str, loss: torch.Tensor, *, spoiled: bool) -> None:
        """Backward pass and optimizer. `spoiled`: makes the gradients NaN, so that DeepSpeed does not take the step."""
        with self._spans("backward"):
            self.engines[name].backward(loss * math.nan if spoiled else loss, scale_wrt_gas=False)
        with self._spans("optimizer"):
            self.engines[name].step()

    def _mean(self, losses: list[torch.Tensor], count: float) -> float:
        """The step's mean loss. Collective; waits for the device."""
        total = self._ranks.sum_on_device(torch.stack(losses).sum())
        return float(total) / max(count, 1.0)

    def _skipped_steps(self) -> int:
        """Number of steps that DeepSpeed refused for a non-finite gradient, equal on every rank."""
        return sum(int(engine.skipped_steps) for engine in self.engines.values())
