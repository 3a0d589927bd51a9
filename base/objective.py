"""What the loop asks of everything that learns (contract 5): an objective, a batch source, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

BatchT = TypeVar("BatchT", bound="Batch")
HISTORY_WINDOWS = 20
"""Log windows that an objective sees when it is asked for alarms."""


class Batch(Protocol):
    """One micro-batch: one pack of one virtual stream."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Keys of the samples inside, for the ledger and the dump of a bad batch."""

    def to(self: BatchT, device: torch.device) -> BatchT:
        """A copy with every tensor on `device`."""


@dataclass
class Term:
    """A part of the loss with units of its own: `weight` times the mean of `loss_sum` over them."""

    loss_sum: Tensor
    weight: float


@dataclass
class LossOutput:
    """What one micro-batch gives.

    `loss_sum`: fp32 scalar with a graph, the SUM over the batch's `count` units (images or tokens): the loop
    divides by the global count over micro-batches and ranks.
    `metrics`: detached fp32 scalars, sums over the same units (the loop logs sum / count).
    `adversary_batch`: what the adversary's update needs, detached, or None.
    `further`: terms over other units than `count`'s, by the names in `further_counts`; logged as NAME_loss.
    `flops`: useful floating-point operations of forward and backward pass; 0: unknown.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    adversary_batch: Any = None
    further: dict[str, Term] = field(default_factory=dict)
    flops: float = 0.0


class Objective(Protocol):
    """Owns the modules; says what is trained, what a micro-batch costs, and what is kept at the end.

    `model` holds every parameter of the main optimizer; frozen helpers that must not be saved or wrapped
    (replica encoder, perceptual network) stay outside it. `adversary` is trained by a second optimizer.
    `loss` runs inside the DeepSpeed engine's forward, so `torch.autograd.grad` towards inner tensors is allowed.
    All randomness comes from generators seeded by the batch, never from the global state.
    """

    @property
    def name(self) -> str:
        """What the console calls the run."""

    @property
    def model(self) -> nn.Module:
        """See above."""

    @property
    def adversary(self) -> nn.Module | None:
        """See above; None: there is none."""

    def to(self, device: torch.device) -> None:
        """Moves model, adversary and frozen helpers."""

    def count(self, batch: Any) -> int:
        """Units (images or loss tokens) in a micro-batch, known before the forward pass; >= 0."""

    def further_counts(self, batch: Any) -> Mapping[str, int]:
        """Units of `LossOutput.further` in a micro-batch: the same names for every batch; {}: there are none."""

    def loss(self, batch: Any, step: int) -> LossOutput:
        """Forward pass and loss of one micro-batch at global step `step`."""

    def adversary_active(self, step: int) -> bool:
        """Whether the adversary is updated at this step (the same answer on every rank)."""

    def adversary_loss(self, adversary_batch: Any, step: int) -> LossOutput:
        """Loss of the adversary on what `loss` handed over; count as in `count`."""

    def samples(self) -> npt.NDArray[np.uint8] | None:
        """A grid [H, W, 3] to look at, made with the weights now in `model`; None if there is nothing to show."""

    def export(self, directory: Path) -> None:
        """Writes safetensors + config.json of the weights now in `model` into an existing empty directory."""

    def alarms(self, history: Sequence[Mapping[str, float]]) -> Sequence[str]:
        """What looks wrong, one sentence each; empty when nothing does.

        `history`: the logged means of the last HISTORY_WINDOWS windows, oldest first, the same numbers on every rank.
        """

    def describe(self) -> Sequence[str]:
        """Lines for people, printed once at the start: what is trained, from what, with which helpers."""

    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of what the run was started from (tokenizer, initial weights); compared on resume."""


class Evaluation(Protocol):
    """What is measured now and then while a training goes on, on the averaged weights."""

    @property
    def every_steps(self) -> int:
        """Steps between two of them; one more follows the last step."""

    def run(self, step: int) -> Mapping[str, float]:
        """Scores by name on the first rank, {} on others; nan: not defined. Collective.

        Called without gradients, when the objective's model holds whole averaged weights in eval mode. Every rank must
        call that model as often: under ZeRO-3 a forward pass is collective.
        """


class WithoutAdversary:
    """The part of `Objective` that those without an adversary share; a term or an alarm of their own replaces its."""

    adversary: nn.Module | None = None

    def further_counts(self, batch: Any) -> Mapping[str, int]:
        """There are none."""
        return {}

    def adversary_active(self, step: int) -> bool:
        """There is none."""
        return False

    def adversary_loss(self, adversary_batch: Any, step: int) -> LossOutput:
        """Never called."""
        raise AssertionError("there is no adversary")

    def alarms(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """None are known."""
        return []


class BatchSource(Protocol):
    """The global order of packs, seen from one rank (contract 2).

    Global step k takes one pack from each of `num_streams` streams; rank r owns streams r, r+R, r+2R...
    """

    num_streams: int

    def next_step(self) -> Sequence[Batch]:
        """This rank's packs of the next global step, in stream order. Never empty while num_streams >= ranks."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able cursors {"fingerprint": ..., "streams": {stream id: cursor}} of the streams this rank owns.

        As of the last step that was *returned*, not of what is prefetched.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the cursors of all streams (merged over ranks) and keeps its own. Refuses another dataset or plan."""

    def metrics(self) -> Mapping[str, float]:
        """Ledger of the last returned step on this rank: samples, tokens, fill, wait seconds."""

    def close(self) -> None:
        """Stops the prefetch thread."""
