"""OmniEdit-Filtered-1.2M (TIGER-Lab, Wei et al. 2024): 1.2 million edits with scores, in parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from base.config import UserError
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.parquet_reading import Row
from data.sources.table_values import number_in

SCORES = (
    "sc_score_1",
    "sc_score_2",
    "pq_score",
    "o_score",
)  # 0 to 10: edit applied, rest unchanged, quality, overall
# Ids are stored but are not keys: a repeated id would end the run after its last shard.
COLUMNS = ParquetColumns(
    source="src_img",
    target="edited_img",
    instruction="edited_prompt_list",
    kept=("omni_edit_id", "task", *SCORES),
)


@dataclass(frozen=True)
class OmniEditFilter:
    """Selects edits by score and task. Implements data.sources.parquet.RowFilter."""

    min_scores: Mapping[str, float] = field(default_factory=dict)  # score column -> least value
    tasks: tuple[
        str, ...
    ] = ()  # "removal", "addition", "swap", "attribute_modification", "env", "style", ...; (): all
    columns: tuple[str, ...] = ("task", *SCORES)

    def __post_init__(self) -> None:
        """Raises UserError: an unknown score."""
        for name in self.min_scores:
            if name not in SCORES:
                raise UserError(f"no score '{name}' in OmniEdit; choose one of {', '.join(SCORES)}")

    @property
    def description(self) -> str:
        """See RowFilter."""
        limits = [f"{name} >= {self.min_scores[name]:g}" for name in sorted(self.min_scores)]
        tasks = f"tasks {', '.join(sorted(self.tasks))}" if self.tasks else "all tasks"
        return ", ".join([*limits, tasks])

    def reason(self, row: Row) -> str | None:
        """See RowFilter. A score that is missing or not a number is below every limit."""
        if self.tasks and row["task"] not in self.tasks:
            return f"task: {row['task']}"
        for name, limit in self.min_scores.items():
            try:
                score = number_in(row[name])
            except ValueError as error:
                return f"score: column '{name}' holds {error}"
            if score is None or score < limit:
                return f"score: {name} is {row[name]}, below {limit:g}"
        return None


def omniedit_source(
    paths: Sequence[str], max_samples_per_shard: int, row_filter: OmniEditFilter | None = None
) -> ParquetSource:
    """The edits in parquet files of TIGER-Lab/OmniEdit-Filtered-1.2M; json has "instructions", task, id and scores.

    Raises UserError: as ParquetSource.
    """
    return ParquetSource(
        paths,
        COLUMNS,
        max_samples_per_shard,
        name="OmniEdit-Filtered-1.2M (TIGER-Lab, MIT)",
        row_filter=row_filter or OmniEditFilter(),
    )
