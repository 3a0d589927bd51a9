"""Who attends to whom in a pack, without a T x T mask (contracts 3 and 4).

The rule (Bagel's generalized causal attention): causal inside text, full inside image splits, every split
sees all earlier splits of its sample except noisy targets. So every split is one segment: its queries, and as
keys the visible earlier rows of its sample followed by its own. Storage order of a pack's T rows:

    [ text splits | <|vision_start|>, <|vision_end|> of each image | latent tokens of each image ]

Shapes: T rows of the pack, S segments of a bucket, Lq and Lk its padded lengths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.packs.transfer import to_device

Rows = npt.NDArray[np.int64]

# Lengths that share a bucket: steps of 8, or of a quarter of their power of two where that is more.
MIN_LENGTH_STEP = 8


@dataclass(frozen=True)
class Split:
    """One split in rows of the storage order; its keys are the visible earlier rows, then its own."""

    rows: Rows
    keys: Rows


@dataclass(frozen=True)
class VarlenGroup:
    """Segments of one variable-length attention call; their queries are neighbours in storage order."""

    q_lens: tuple[int, ...]  # queries per segment
    k_lens: tuple[int, ...]  # keys per segment
    cu_q: Tensor  # int32 [segments + 1], running sums of q_lens from 0
    cu_k: Tensor  # int32 [segments + 1]
    max_q: int  # 0 when there are no segments
    max_k: int
    kv_index: Tensor  # int64 [sum k_lens]: rows of K and V to gather
    num_rows: int  # rows that K and V have
    first_row: (
        int | None
    )  # where kv_index counts up from here: the rows are a slice; None: they are to be gathered

    @cached_property
    def occurrences(self) -> tuple[Tensor, Tensor]:
        """(positions int64 [sum k_lens], starts int64 [num_rows + 1]): kv_index holds row r at the positions
        positions[starts[r]:starts[r + 1]], which rise.

        Made on the plan's device when a backward pass first asks, once a pack; nothing waits for the device.
        """
        rows, positions = self.kv_index.sort(stable=True)
        return positions, torch.searchsorted(rows, torch.arange(self.num_rows + 1, device=rows.device))


@dataclass(frozen=True)
class PaddedBucket:
    """Segments of similar shape, padded to one size, for backends that take a mask (SDPA).

    Padded queries repeat the segment's first row and attend like its last query, so that no softmax is empty.
    """

    q_index: Tensor  # int64 [S, Lq] storage rows
    q_valid: Tensor  # bool [S, Lq], False on padding
    kv_index: Tensor  # int64 [S, Lk] storage rows
    num_visible: Tensor  # int64 [S, Lq]: the first so many of the Lk keys are seen by this query

    @cached_property
    def mask(self) -> Tensor:
        """bool [S, 1, Lq, Lk], True = attend. Made where it is used, once: a pack's masks are megabytes."""
        keys = torch.arange(self.kv_index.shape[1], device=self.kv_index.device)
        return (keys < self.num_visible[..., None])[:, None]


@dataclass(frozen=True)
class PaddedSplits:
    """All splits of a plan for SDPA, one segment each."""

    buckets: tuple[PaddedBucket, ...]
    out_index: Tensor  # int64 [T]: row t is row out_index[t] of the buckets' flattened outputs, concatenated


@dataclass(frozen=True)
class AttentionPlan:
    """One pack's attention: as two variable-length calls, and for SDPA as padded buckets, made when asked for.

    `causal`: queries are rows 0 .. num_causal - 1, one segment per text split, causal aligned at the bottom
    right (query i of Lq sees keys 0 .. Lk - Lq + i). `full`: queries are the other rows, one segment per
    image for its two special tokens, then one per image for its latent tokens, non-causal. Keys: see `Split`.
    """

    num_tokens: int  # T: rows that ask, all of the pack; fewer in `outputs`
    num_causal: int  # rows of text splits
    causal: VarlenGroup
    full: VarlenGroup
    text: tuple[Split, ...]  # what the buckets are made of
    images: tuple[Split, ...]
    # For a last layer of which only noisy latents are read: they ask, numbered from 0, and all rows answer.
    outputs: AttentionPlan | None = None

    def to(self, device: torch.device) -> AttentionPlan:
        """A copy on `device`, with its buckets if they are built."""
        return to_device(self, device)

    def build_buckets(self) -> None:
        """Now and on this thread, what is otherwise built when SDPA first asks.

        SDPA alone reads them: where a variable-length kernel runs, none is built or moved.
        """
        _ = self._padded

    @property
    def has_buckets(self) -> bool:
        """Whether they are built."""
        return "_padded" in self.__dict__

    @property
    def buckets(self) -> tuple[PaddedBucket, ...]:
        """See PaddedSplits."""
        return self._padded.buckets

    @property
    def out_index(self) -> Tensor:
        """See PaddedSplits."""
        return self._padded.out_index

    @cached_property
    def _padded(self) -> PaddedSplits:
        return to_device(_build_buckets(self.num_tokens, self.text, self.images), self.causal.cu_q.device)

    def of(self, num_queries: int) -> AttentionPlan:
        """This plan, or `outputs` when so many queries are the outputs."""
        if num_queries == self.num_tokens:
            return self
        assert self.outputs is not None and self.outputs.num_tokens == num_queries, "queries of another plan"
        return self.outputs

    @property
    def attended_area(self) -> int:
        """Query-key pairs that the rule asks for; what an honest FLOP count uses."""
        causal = sum(
            q * k - q * (q - 1) // 2 for q, k in zip(self.causal.q_lens, self.causal.k_lens, strict=True)
        )
        return causal + sum(q * k for q, k in zip(self.full.q_lens, self.full.k_lens, strict=True))


def build_attention_plan(
    num_tokens: int,
    text: Sequence[Split],
    images: Sequence[Split],
    *,
    num_special: int = 2,
    num_rows: int | None = None,
    outputs: AttentionPlan | None = None,
) -> AttentionPlan:
    """Splits come in storage order; an image's rows are its `num_special` special tokens, then its latents.

    `num_rows`: rows of K and V, where they are not the `num_tokens` that ask.
    """
    num_causal = sum(len(split.rows) for split in text)
    num_rows = num_tokens if num_rows is None else num_rows
    parts = [[len(split.rows) - num_special for split in images]]
    if num_special:
        parts.insert(0, [num_special] * len(images))
    return AttentionPlan(
        num_tokens=num_tokens,
        num_causal=num_causal,
        causal=_build_group([len(split.rows) for split in text], [split.keys for split in text], num_rows),
        full=_build_group(
            [length for part in parts for length in part],
            [split.keys for split in images] * len(parts),
            num_rows,
        ),
        text=tuple(text),
        images=tuple(images),
        outputs=outputs,
    )


def _build_group(q_lens: list[int], keys: list[Rows], num_rows: int) -> VarlenGroup:
    k_lens = [len(rows) for rows in keys]
    kv_index = np.concatenate(keys) if keys else np.zeros(0, np.int64)
    is_range = len(kv_index) > 0 and bool((np.diff(kv_index) == 1).all())
    return VarlenGroup(
        q_lens=tuple(q_lens),
        k_lens=tuple(k_lens),
        cu_q=_running_sums(q_lens),
        cu_k=_running_sums(k_lens),
        max_q=max(q_lens, default=0),
        max_k=max(k_lens, default=0),
        kv_index=torch.from_numpy(kv_index),
        num_rows=num_rows,
        first_row=int(kv_index[0]) if is_range else None,
    )


def _running_sums(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _build_buckets(num_tokens: int, text: Sequence[Split], images: Sequence[Split]) -> PaddedSplits:
    """One segment per split (here an image's specials and latents go together: they have the same keys)."""
    groups: dict[tuple[int, int], list[tuple[Split, bool]]] = defaultdict(list)
    for splits, causal in ((text, True), (images, False)):
        for split in splits:
            groups[_length_class(len(split.rows)), _length_class(len(split.keys))].append((split, causal))
    out_index = np.full(num_tokens, -1, np.int64)
    buckets = []
    first_row = 0
    for shape in sorted(groups):
        q_lens = np.array([len(split.rows) for split, _ in groups[shape]])[:, None]
        k_lens = np.array([len(split.keys) for split, _ in groups[shape]])[:, None]
        is_causal = np.array([flag for _, flag in groups[shape]])[:, None]
        query = np.arange(q_lens.max())[None]
        q_valid, k_valid = query < q_lens, np.arange(k_lens.max())[None] < k_lens
        rows = np.concatenate([split.rows for split, _ in groups[shape]])
        q_index, kv_index = np.zeros(q_valid.shape, np.int64), np.zeros(k_valid.shape, np.int64)
        q_index[:] = np.array([split.rows[0] for split, _ in groups[shape]])[:, None]
        q_index[q_valid] = rows
        kv_index[k_valid] = np.concatenate([split.keys for split, _ in groups[shape]])
        num_visible = np.where(is_causal, k_lens - q_lens + np.minimum(query, q_lens - 1) + 1, k_lens)
        out_index[rows] = first_row + np.flatnonzero(q_valid)
        first_row += q_index.size
        buckets.append(
            PaddedBucket(*(torch.from_numpy(x) for x in (q_index, q_valid, kv_index, num_visible)))
        )
    assert (out_index >= 0).all(), "a row belongs to no split"
    return PaddedSplits(tuple(buckets), torch.from_numpy(out_index))


def _length_class(length: int) -> int:
    """`length` rounded up to its bucket's step: at most a quarter more, except below 32."""
    step = max(MIN_LENGTH_STEP, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step
