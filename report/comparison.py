"""Two runs scored on the same items: which run is right where, and whether the difference can be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from report.run_contents import Evaluation


@dataclass(frozen=True)
class Paired:
    """Right and wrong answers of one metric over the items that both runs have."""

    suite: str
    metric: str
    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def p_value(self) -> float:
        """Two-sided exact sign test on the items where the runs differ (McNemar 1947); 1 if they never differ."""
        differ, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(differ, k) for k in range(fewer + 1))
        return min(1.0, float(2 * tail / 2**differ))


def paired(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> list[Paired]:
    """Every yes-or-no metric of every suite that both runs have; items are matched by key."""
    others = {str(evaluation.scores["suite"]): evaluation for evaluation in reversed(second)}
    found = []
    for evaluation in first:
        suite = str(evaluation.scores["suite"])
        if suite in others:
            found += _paired(suite, evaluation, others[suite])
    return found


def _paired(suite: str, first: Evaluation, second: Evaluation) -> list[Paired]:
    counts: dict[str, dict[tuple[bool, bool], int]] = {}
    for key, line in first.per_item.items():
        theirs = second.per_item[key]["values"] if key in second.per_item else {}
        for metric, value in line["values"].items():
            other = theirs.get(metric)
            if isinstance(value, bool) and isinstance(other, bool):
                table = counts.setdefault(metric, {})
                table[value, other] = table.get((value, other), 0) + 1
    return [
        Paired(
            suite,
            metric,
            *(table.get(pair, 0) for pair in ((True, True), (True, False), (False, True), (False, False))),
        )
        for metric, table in counts.items()
    ]
