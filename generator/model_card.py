"""The README.md of an exported generator, written from its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from base.config import to_dict
from generator.config import QWEN_PREFIX, Task, TimeShift
from generator.flow import resolve_shift
from generator.model import Generator
from generator.sampling_config import SamplingConfig

LAST_WINDOWS = 10
"""Number of log windows, at the end of training, over which the card averages losses."""
CALLS = {
    "t2i": 'images = pipeline.generate(["a red apple on a blue table"], sampling=sampling)',
    "edit": 'images = pipeline.edit(["photo.jpg"], ["make the table blue"], sampling=sampling)',
}
TITLES = {"t2i": "text-to-image", "edit": "image editing"}
PIPELINE_TAGS = {"t2i": "text-to-image", "edit": "image-to-image"}


@dataclass(frozen=True)
class Card:
    """The facts on the card; unknown facts are left out."""

    name: str  # on the hub, "owner/name"
    task: Task
    license: str
    data: Sequence[str]  # a sentence for each data set
    optimizer: Mapping[str, object]
    steps: int
    metrics: Sequence[Mapping[str, float | None]]  # the lines of metrics.jsonl
    started_from: str | None  # origin of the initial weights; None: new ones
    commit: str | None  # commit of the code
    time_shift: TimeShift = "auto"  # time shift of the training


def model_card(card: Card, model: Generator, sampling: SamplingConfig) -> str:
    """The card as Markdown with the hub's front matter."""
    front = [f"license: {card.license}", "library_name: rpiae", f"pipeline_tag: {PIPELINE_TAGS[card.task]}"]
    front += ["tags:", *(f"- {tag}" for tag in ("rpiae", "flow-matching", "mixture-of-transformers"))]
    base = model.config.init.removeprefix(QWEN_PREFIX) if model.config.init.startswith(QWEN_PREFIX) else None
    if base is not None and base.count("/") == 1 and not base.startswith((".", "/")):
        front.append(f"base_model: {base}")
    lines = ["---", *front, "---", f"# {card.name.rpartition('/')[2]}", "", *_about(card, model), ""]
    lines += ["## Use", "With the code of RPiAE installed (`pip install -e .` in its folder):", "```python"]
    lines += ["from generator.pretrained import load_pretrained", ""]
    lines += [f'pipeline, sampling = load_pretrained("{card.name}", device="cuda")', CALLS[card.task]]
    lines += ['images[0].save("result.png")', "```", "", "## Sampling defaults", "```json"]
    lines += [json.dumps(to_dict(sampling)), "```", "", "## Training", *_training(card, model)]
    return "\n".join(lines) + "\n"


def _about(card: Card, model: Generator) -> list[str]:
    shape, backbone = model.latents.shape, model.config.backbone
    size = f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    head = "" if model.config.head is None else f", DDT head {to_dict(model.config.head)}"
    return [
        f"A generator for {TITLES[card.task]}: a mixture of two transformers of {backbone.num_layers} layers and width "
        f"{backbone.width}{head}, {size}, trained by flow matching on latents of {' x '.join(map(str, shape))}.",
        "The folder holds the autoencoder and the text tokenizer it was trained with.",
    ]


def _training(card: Card, model: Generator) -> list[str]:
    facts = {
        "data": "; ".join(card.data),
        "started from": card.started_from or model.config.init,
        "steps": f"{card.steps:,}",
        "tokens": _total(card.metrics, "tokens"),
        "samples": _total(card.metrics, "samples"),
        **_losses(card.metrics),
        "optimizer": json.dumps(dict(card.optimizer)),
        "time shift": f"{resolve_shift(card.time_shift, model.latents.shape):.3g}",
        "autoencoder's fingerprint": model.latents.tokenizer_fingerprint,
        "text tokenizer's fingerprint": model.latents.text_tokenizer_fingerprint,
        "code": card.commit and f"commit {card.commit}, at the time of the export",
    }
    return [f"- {what}: {value}" for what, value in facts.items() if value]


def _total(metrics: Sequence[Mapping[str, float | None]], name: str) -> str:
    return f"{total:,.0f}" if (total := sum(row.get(name) or 0 for row in metrics)) else ""


def _losses(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, str]:
    """Every logged loss, averaged over the last log windows."""
    last = metrics[-LAST_WINDOWS:]
    losses: dict[str, str] = {}
    for name in ("loss", "text_loss"):
        values = [value for row in last if (value := row.get(name)) is not None]
        if values:
            label = f"{name.replace('_', ' ')}, mean of the last {len(values)} log lines"
            losses[label] = f"{sum(values) / len(values):.4f}"
    return losses
