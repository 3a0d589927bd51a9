"""Image sections of the report: the first items of every group in manifest order, never picked by hand."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from data.images import read_rgb_file
from evaluation.manifest import Item
from evaluation.report.inputs import Evaluation

MAX_SMALL_PX = 128  # images up to this side are shown larger, pixel by pixel
MAX_PX = 256  # larger ones are shown smaller
MAX_RECONSTRUCTIONS = 20
MAX_SAMPLES = 18  # of each group
MAX_EDITS = 8  # of each group


def reconstructions(evaluation: Evaluation) -> str:
    """Originals beside what the autoencoder makes of them."""
    cards = []
    items = [item for group in evaluation.groups().values() for item in group]
    for item in items[:MAX_RECONSTRUCTIONS]:
        psnr_db = evaluation.per_item[item.key]["values"]["psnr_db"]
        roles = [("original", "original"), ("result", f"decoded, {psnr_db:.1f} dB")]
        cards.append(f"<figure>{strip(evaluation, item, roles)}</figure>")
    return grid(cards, 284)


def text_to_image(evaluation: Evaluation) -> str:
    """Samples with their captions and what the judge says."""
    sections = []
    for group, items in evaluation.groups().items():
        cards = []
        for item in items[:MAX_SAMPLES]:
            line = evaluation.per_item[item.key]
            marks = [_mark("objects", line["values"]["object_right"])]
            marks.append(_mark("background", line["values"]["background_right"]))
            if line["values"]["relation_right"] is not None:
                marks.append(_mark("order", line["values"]["relation_right"]))
            cards.append(
                f"<figure>{strip(evaluation, item, [('result', '')])}"
                f"<figcaption>{escape(_text(item, 'caption'))}{_judged(marks, line)}</figcaption></figure>"
            )
        sections.append(_group(group, len(items), len(cards)) + grid(cards, 168))
    return "".join(sections)


def edits(evaluation: Evaluation) -> str:
    """Triples: source, instruction, result."""
    sections = []
    for group, items in evaluation.groups().items():
        cards = []
        for item in items[:MAX_EDITS]:
            line = evaluation.per_item[item.key]
            marks = [_mark("change", line["values"]["change_done"])]
            outside_db = line["values"]["psnr_outside_db"]
            if outside_db is not None:
                marks.append(f"<span>{outside_db:.1f} dB outside</span>")
            pair = strip(evaluation, item, [("source", "source"), ("result", "result")])
            instruction = escape(_text(item, "instruction"))
            cards.append(
                f"<figure>{pair}<figcaption>“{instruction}”{_judged(marks, line)}</figcaption></figure>"
            )
        sections.append(_group(group, len(items), len(cards)) + grid(cards, 284))
    return "".join(sections)


def inlined(image: Image.Image, alt: str, min_px: int, max_px: int) -> str:
    """An <img> that holds its bytes: at most `max_px` a side; up to `min_px` enlarged, pixel by pixel.

    Small images as PNG, others as JPEG, which is a tenth of it.
    """
    image.thumbnail((max_px, max_px))
    is_small = max(image.size) <= min_px
    scale = max(1, min_px // max(image.size))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG" if is_small else "JPEG", quality=88)
    payload = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/{"png" if is_small else "jpeg"};base64,{payload}" width="{image.width * scale}" '
        f'height="{image.height * scale}" alt="{escape(alt)}">'
    )


def _group(name: str, num_items: int, num_shown: int) -> str:
    shown = f"the first {num_shown} of {num_items}" if num_shown < num_items else f"all {num_items}"
    return f"<h3>{escape(name.replace('_', ' ').capitalize() or 'All')} · {shown}</h3>"


def grid(cards: Sequence[str], cell_px: int) -> str:
    """Figures side by side, each at least that wide."""
    return f'<div class="grid-cards" style="--cell: {cell_px}px">{"".join(cards)}</div>'


def strip(evaluation: Evaluation, item: Item, roles: Sequence[tuple[str, str]]) -> str:
    """An item's images, each with its label."""
    parts = []
    for role, label in roles:
        note = f'<span class="role">{label}</span>' if label else ""
        parts.append(f"<div>{_image(evaluation, item, role)}{note}</div>")
    return f'<div class="strip">{"".join(parts)}</div>'


def _image(evaluation: Evaluation, item: Item, role: str) -> str:
    assert evaluation.images is not None
    path = evaluation.images.path(item, role)
    if not path.is_file():
        return '<span class="absent">image is gone</span>'
    return inlined(read_rgb_file(path), f"{role} of {item.key}", MAX_SMALL_PX, MAX_PX)


def _text(item: Item, field: str) -> str:
    """The caption or instruction that was used: `field`, or the first of its plural."""
    several = item.meta.get(f"{field}s") or [""]
    return str(item.meta.get(field) or several[0])


def _mark(label: str, right: bool) -> str:
    sign, kind = ("✓", "good") if right else ("✗", "bad")
    return f'<span class="{kind}">{sign} {label}</span>'


def _judged(marks: Sequence[str], line: Mapping[str, Any]) -> str:
    """The marks and, where one of them is a cross, what the judge saw instead."""
    text = " ".join(marks)
    if "✗" in text:
        seen = ", ".join(line["detail"]["seen"]) or "nothing"
        text += f"<br>judge sees: {escape(seen)} on {escape(line['detail']['background'])}"
    return f'<span class="marks">{text}</span>'
