"""The interface of everything that the loop trains: an objective, a batch source, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:  # so that configs, which know this interface, are read without torch
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

BatchT = TypeVar("BatchT", bound="Batch")
HISTORY_WINDOWS = 20
"""Number of log windows that an objective sees when the loop asks it for alarms."""


class Batch(Protocol):
    """One micro-batch: one pack of one virtual stream."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Keys of the samples in the batch, for the ledger and the dump of a bad batch."""

    def to(self: BatchT, device: torch.device) -> BatchT:
        """A copy with every tensor on `device`."""


@dataclass
class Term:
    """A part of the loss with its own units: it adds `weight` times the mean of `loss_sum` over these units."""

    loss_sum: Tensor
    weight: float


@dataclass
class LossOutput:
    """Loss and metrics of one micro-batch.

    `loss_sum`: fp32 scalar with a graph, the SUM over the batch's `count` units (images or tokens). The loop divides it
    by the global count over micro-batches and ranks.
    `metrics`: detached fp32 scalars, sums over the same units (the loop logs sum / count).
    `adversary_batch`: the detached input of the adversary's update, or None.
    `further`: terms whose units are not those of `count`, by the names in `further_counts`; logged as NAME_loss.
    `flops`: useful floating-point operations of forward and backward pass; 0: unknown.
    """

    loss_sum: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    adversary_batch: Any = None
    further: dict[str, Term] = field(default_factory=dict)
    flops: float = 0.0


class Objective(Protocol):
    """Owns the modules, and defines what is trained, the loss of a micro-batch, and what is exported.

    `model` holds every parameter of the main optimizer; frozen helpers that must not be saved or wrapped
    (replica encoder, perceptual network) stay outside it. `adversary` is trained by a second optimizer.
    `loss` runs inside the DeepSpeed engine's forward, so `torch.autograd.grad` towards inner tensors is allowed.
    All randomness comes from generators seeded by the batch, never from the global state.
    """

    @property
    def name(self) -> str:
        """The run's name on the console."""

    @property
    def model(self) -> nn.Module:
        """The module with every parameter of the main optimizer."""

    @property
    def adversary(self) -> nn.Module | None:
        """The module that the second optimizer trains; None: the objective has no adversary."""

    def to(self, device: torch.device) -> None:
        """Moves model, adversary and frozen helpers to `device`."""

    def count(self, batch: Any) -> int:
        """Number of units (images or loss tokens) in a micro-batch, known before the forward pass; >= 0."""

    def further_counts(self, batch: Any) -> Mapping[str, int]:
        """Number of units of each term in `LossOutput.further`. Every batch has equal names; {}: no further terms."""

    def loss(self, batch: Any, step: int) -> LossOutput:
        """Forward pass and loss of one micro-batch at global step `step`."""

    def adversary_active(self, step: int) -> bool:
        """Whether the adversary is updated at this step; every rank must answer alike."""

    def adversary_loss(self, adversary_batch: Any, step: int) -> LossOutput:
        """Loss of the adversary on `LossOutput.adversary_batch`; its units are those of `count`."""

    def samples(self) -> npt.NDArray[np.uint8] | None:
        """A grid of samples, uint8 [H, W, 3], from the weights now in `model`; None: there is nothing to show."""

    def export(self, directory: Path) -> None:
        """Writes the weights now in `model` (safetensors) and config.json into an existing empty directory."""

    def alarms(self, history: Sequence[Mapping[str, float]]) -> Sequence[str]:
        """One sentence for each thing that looks wrong; empty if nothing does.

        `history`: the logged means of the last HISTORY_WINDOWS windows, oldest first, equal on every rank.
        """

    def describe(self) -> Sequence[str]:
        """Lines for people, printed once at the start: what is trained, from which weights, with which helpers."""

    def fingerprints(self) -> Mapping[str, str]:
        """Hashes of the run's inputs (tokenizer, initial weights), which are compared on resume."""


class Evaluation(Protocol):
    """A measurement of the averaged weights, repeated while a training goes on."""

    @property
    def every_steps(self) -> int:
        """Steps between two evaluations; another evaluation follows the last step."""

    def run(self, step: int) -> Mapping[str, float]:
        """Scores by name on the first rank, {} on others; nan: not defined. Collective.

        The loop calls it without gradients, while the objective's model holds whole averaged weights in eval mode.
        Every rank must call that model equally often: under ZeRO-3 a forward pass is collective.
        """


class WithoutAdversary:
    """Base of objectives without an adversary. A subclass with further terms or alarms overrides those methods."""

    adversary: nn.Module | None = None

    def further_counts(self, batch: Any) -> Mapping[str, int]:
        """No further terms."""
        return {}

    def adversary_active(self, step: int) -> bool:
        """Never: there is no adversary."""
        return False

    def adversary_loss(self, adversary_batch: Any, step: int) -> LossOutput:
        """Never called. Raises AssertionError."""
        raise AssertionError("there is no adversary")

    def alarms(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """No alarms."""
        return []


class BatchSource(Protocol):
    """The global order of packs, seen from one rank.

    Global step k takes one pack from each of `num_streams` streams; rank r owns streams r, r+R, r+2R...
    """

    num_streams: int

    def next_step(self) -> Sequence[Batch]:
        """This rank's packs of the next global step, in stream order; at least one, as num_streams >= ranks."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able cursors {"fingerprint": ..., "streams": {stream id: cursor}} of the streams this rank owns.

        The cursors are those after the last *returned* step; prefetched steps do not count.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the cursors of all streams (merged over ranks). Raises UserError: they are of other data or plan."""

    def metrics(self) -> Mapping[str, float]:
        """Ledger of the last returned step on this rank: samples, tokens, fill, seconds of waiting."""

    def close(self) -> None:
        """Stops the prefetch thread."""
