"""The page of a GPU: every number of the JSON beside its goal, if any, and what falls short."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BAGEL_TOKENS_PER_S = 5_200  # speed of one GPU, as users of Bagel's code report it
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """A value that the best training measurement at one size of pack must reach."""

    text: str
    pack_tokens: int
    value: str
    at_least: float
    form: str

    def verdict(self, entries: Sequence[Entry]) -> tuple[float | None, str]:
        """The best measured value, and a line with it and the goal."""
        found = [
            entry["values"][self.value]
            for entry in _measured(entries, "training")
            if entry["name"].startswith(f"{self.pack_tokens:,} tokens")
            and entry["values"][self.value] is not None
        ]
        best = max(found, default=None)
        reached = "not measured" if best is None else f"{best:{self.form}}"
        return best, f"{self.text}: {reached}, goal {self.at_least:{self.form}}"


GOALS = (
    Goal("MFU of the 0.5B mixture at 49,152 tokens a pack", 49_152, "mfu", 0.45, ".1%"),
    Goal(
        "tokens/s at 49,152 tokens a pack (15 times what users of Bagel's code report)",
        49_152,
        "tokens_per_s",
        15 * BAGEL_TOKENS_PER_S,
        ",.0f",
    ),
)


def falls_short(entries: Sequence[Entry]) -> list[str]:
    """A line for each goal that is not reached, each failed measurement and each measurement left out."""
    lines = []
    for goal in GOALS:
        best, text = goal.verdict(entries)
        if best is None or best < goal.at_least:
            lines.append(text)
    for entry in entries:
        for kind in ("error", "skipped"):
            if kind in entry:
                lines.append(f"{entry['group']}, {entry['name']}: {kind}: {entry[kind]}")
    return lines


def render(machine: Mapping[str, str], versions: Mapping[str, str], entries: Sequence[Entry]) -> str:
    """The page as Markdown."""
    lines = [
        f"# {machine['gpu']}",
        "",
        f"Printed by `make gpu`. {_pairs(machine)}. {_pairs(versions)}.",
        "",
        "## Goals",
        *(f"- {goal.verdict(entries)[1]}" for goal in GOALS),
        "",
        "## Falls short, failed or left out",
        *(f"- {line}" for line in falls_short(entries) or ["nothing"]),
        "",
        "## Tests",
        *(f"- {entry['name']}: {_pairs(entry['values'])}" for entry in _measured(entries, "tests")),
        "",
        "## Training of the 0.5B mixture, as the loop takes its steps",
        *_training(list(_measured(entries, "training"))),
        "",
        "## Tokenizer stages",
        *_stages(list(_measured(entries, "tokenizer"))),
        "",
        "## Encoding and sampling",
        *_rates([*_measured(entries, "encoding"), *_measured(entries, "sampling")]),
    ]
    return "\n".join(lines) + "\n"


def _training(entries: Sequence[Entry]) -> list[str]:
    titles = ["packs", "kernel", "tokens/s", "images/s", "TFLOP/s", "MFU", "GiB"]
    rows = []
    for entry in entries:
        v = entry["values"]
        rows.append(
            [
                entry["name"],
                v["kernel"],
                f"{v['tokens_per_s']:,.0f}",
                f"{v['images_per_s']:,.0f}",
                f"{v['tflops_per_s']:,.1f}",
                _share(v["mfu"]),
                _gib(v["peak_gib"]),
                *map(_share, v["shares"].values()),
            ]
        )
    return _table([*titles, *_classes(e["values"] for e in entries)], rows)


def _stages(entries: Sequence[Entry]) -> list[str]:
    phases = [
        (f"{entry['name']}: {name}", entry["values"]["images_a_pack"], values)
        for entry in entries
        for name, values in entry["values"]["phases"].items()
    ]
    rows = [
        [
            name,
            str(images),
            f"{v['images_per_s']:,.1f}",
            _gib(v["peak_gib"]),
            *map(_share, v["shares"].values()),
        ]
        for name, images, v in phases
    ]
    return _table(["stage", "images a pack", "images/s", "GiB", *_classes(v for _, _, v in phases)], rows)


def _rates(entries: Sequence[Entry]) -> list[str]:
    rows = [
        [entry["name"], f"{entry['values']['images_per_s']:,.1f}", _gib(entry["values"]["peak_gib"])]
        for entry in entries
    ]
    return _table(["what", "images/s", "GiB"], rows)


def _measured(entries: Iterable[Entry], group: str) -> Iterable[Entry]:
    return (entry for entry in entries if entry["group"] == group and "values" in entry)


def _classes(values: Iterable[Entry]) -> list[str]:
    return list(next(iter(values), {"shares": {}})["shares"])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return ["nothing was measured"]
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if name != "took_s")
