"""Describes which tokens of a pack attend to which, without a T x T mask (docs/architecture.md, section 4).

The rule is Bagel's generalized causal attention: attention is causal inside a text split and full inside an image
split, and every split sees all earlier splits of its sample except noisy targets. So every split is one segment: its
rows are the queries; its keys are the visible earlier rows of its sample, then its own. The T rows of a pack lie in
this storage order:

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

# Lengths are rounded up to share a bucket: to steps of 8, or of a quarter of their power of two if that is more.
MIN_LENGTH_STEP = 8


@dataclass(frozen=True)
class Split:
    """One split, as rows in storage order; its keys are the visible earlier rows, then its own rows."""

    rows: Rows
    keys: Rows


@dataclass(frozen=True)
class VarlenGroup:
    """Segments of one variable-length attention call. Their queries are contiguous in storage order."""

    q_lens: tuple[int, ...]  # queries per segment
    k_lens: tuple[int, ...]  # keys per segment
    cu_q: Tensor  # int32 [segments + 1], running sums of q_lens from 0
    cu_k: Tensor  # int32 [segments + 1]
    max_q: int  # 0 if there are no segments
    max_k: int
    kv_index: Tensor  # int64 [sum k_lens]: rows of K and V to gather
    num_rows: int  # rows of K and V
    first_row: (
        int | None
    )  # kv_index counts up from this row, so the rows are a slice; None: they must be gathered

    @cached_property
    def occurrences(self) -> tuple[Tensor, Tensor]:
        """Inverse of kv_index: (positions int64 [sum k_lens], starts int64 [num_rows + 1]).

        kv_index holds row r at positions[starts[r]:starts[r + 1]], which ascend. Computed once a pack on the plan's
        device, when a backward pass first needs it; nothing waits for the device.
        """
        rows, positions = self.kv_index.sort(stable=True)
        return positions, torch.searchsorted(rows, torch.arange(self.num_rows + 1, device=rows.device))


@dataclass(frozen=True)
class PaddedBucket:
    """Segments of similar shape, padded to one size, for a backend that takes a mask (SDPA).

    Padded queries repeat the segment's first row and attend as its last query does, so that no softmax is empty.
    """

    q_index: Tensor  # int64 [S, Lq] storage rows
    q_valid: Tensor  # bool [S, Lq], False on padding
    kv_index: Tensor  # int64 [S, Lk] storage rows
    num_visible: Tensor  # int64 [S, Lq]: this query sees the first num_visible of the Lk keys

    @cached_property
    def mask(self) -> Tensor:
        """bool [S, 1, Lq, Lk], True = attend. Computed on first use, on the device: a pack's masks are megabytes."""
        keys = torch.arange(self.kv_index.shape[1], device=self.kv_index.device)
        return (keys < self.num_visible[..., None])[:, None]


@dataclass(frozen=True)
class PaddedSplits:
    """All splits of a plan in padded buckets for SDPA, one segment each."""

    buckets: tuple[PaddedBucket, ...]
    out_index: Tensor  # int64 [T]: row t is row out_index[t] of the buckets' concatenated flat outputs


@dataclass(frozen=True)
class AttentionPlan:
    """One pack's attention: two variable-length calls, or for SDPA padded buckets, which are built on first use.

    `causal`: the queries are rows 0 .. num_causal - 1, one segment per text split, causal, aligned at the bottom right
    (query i of Lq sees keys 0 .. Lk - Lq + i). `full`: the queries are the other rows, non-causal, one segment per
    image for its two special tokens, then one segment per image for its latent tokens. `Split` defines a segment's
    keys.
    """

    num_tokens: int  # T: number of queries: all rows of the pack; fewer in `outputs`
    num_causal: int  # rows of text splits
    causal: VarlenGroup
    full: VarlenGroup
    text: tuple[Split, ...]  # text and images: the splits that the buckets pad
    images: tuple[Split, ...]
    # The plan of a last layer whose noisy latents alone are read: these are the queries, numbered from 0; all rows are
    # keys.
    outputs: AttentionPlan | None = None

    def to(self, device: torch.device) -> AttentionPlan:
        """A copy on `device`, with its buckets if they are built."""
        return to_device(self, device)

    def build_buckets(self) -> None:
        """Builds the padded buckets now, on this thread; otherwise SDPA's first use builds them.

        Only SDPA needs the buckets: runs with a variable-length kernel neither build nor move them.
        """
        _ = self._padded

    @property
    def has_buckets(self) -> bool:
        """Whether the padded buckets are built."""
        return "_padded" in self.__dict__

    @property
    def buckets(self) -> tuple[PaddedBucket, ...]:
        """The padded buckets; builds them if needed."""
        return self._padded.buckets

    @property
    def out_index(self) -> Tensor:
        """Where each row lies in the buckets' outputs, int64 [T] (PaddedSplits); builds the buckets if needed."""
        return self._padded.out_index

    @cached_property
    def _padded(self) -> PaddedSplits:
        return to_device(_build_buckets(self.num_tokens, self.text, self.images), self.causal.cu_q.device)

    def of(self, num_queries: int) -> AttentionPlan:
        """This plan if it has `num_queries` queries, else `outputs`. Raises AssertionError: neither has."""
        if num_queries == self.num_tokens:
            return self
        assert self.outputs is not None and self.outputs.num_tokens == num_queries, "queries of another plan"
        return self.outputs

    @property
    def attended_area(self) -> int:
        """Number of query-key pairs under the rule, without padding: the basis of FLOP counts."""
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
    """Builds a plan of splits in storage order; an image's rows are its `num_special` special tokens, then its latents.

    `num_rows`: number of rows of K and V; None: `num_tokens`, the number of queries.
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
    """One segment per split. An image's special tokens and latents share a segment, because they share their keys."""
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
