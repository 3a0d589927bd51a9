"""Image sections of the report: the first items of every group in manifest order, never hand-picked."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from base import files
from data.image_set import Item
from data.samples.images import read_rgb_file
from report.markup import Html, fill, together
from report.run_contents import Evaluation

MAX_SMALL_PX = 128  # images up to this side are shown larger, pixel by pixel
MAX_PX = 256  # larger images are shown smaller
MAX_RECONSTRUCTIONS = 20
MAX_SAMPLES = 18  # shown of each group
MAX_EDITS = 8  # shown of each group


_IMAGE = """\
<img src="data:image/{{ kind }};base64,{{ payload }}" width="{{ width }}" height="{{ height }}" alt="{{ alt }}">"""
_GRID = """\
<div class="grid-cards" style="--cell: {{ cell_px }}px">{% for card in cards %}{{ card }}{% endfor %}</div>"""
_STRIP = """\
<div class="strip">
{%- for image, label in shown -%}
<div>{{ image }}{% if label %}<span class="role">{{ label }}</span>{% endif %}</div>
{%- endfor -%}
</div>"""
_CARD = """\
<figure>{{ strip }}<figcaption>{{ text }}<span class="marks">
{%- for right, word in marks -%}
{{ " " if not loop.first }}<span
{%- if right is not none %} class="{{ "good" if right else "bad" }}"{% endif -%}
>{{ {true: "✓ ", false: "✗ "}.get(right, "") }}{{ word }}</span>
{%- endfor -%}
{% if seen %}<br>judge sees: {{ seen }}{% endif %}</span></figcaption></figure>"""

Mark = tuple[bool | None, str]
"""(right, wrong or neither (None); the name of the judged thing)."""


def reconstructions(evaluation: Evaluation) -> Html:
    """Originals beside their reconstructions."""
    cards = []
    items = [item for group in evaluation.groups().values() for item in group]
    for item in items[:MAX_RECONSTRUCTIONS]:
        psnr_db = _value(evaluation, item, "psnr_db")
        label = "decoded" if psnr_db is None else f"decoded, {psnr_db:.1f} dB"
        roles = [("original", "original"), ("result", label)]
        cards.append(fill("<figure>{{ strip }}</figure>", strip=strip(evaluation, item, roles)))
    return grid(cards, 284)


def text_to_image(evaluation: Evaluation) -> Html:
    """Drawn images with their captions and the judge's answers."""

    def card(item: Item) -> Html:
        words = {"objects": "object_right", "background": "background_right", "order": "relation_right"}
        found = {word: _value(evaluation, item, name) for word, name in words.items()}
        marks = [(bool(right), word) for word, right in found.items() if right is not None or word != "order"]
        return _card(evaluation, item, [("result", "")], _text(item, "caption"), marks)

    return _groups(evaluation, card, MAX_SAMPLES, 168)


def edits(evaluation: Evaluation) -> Html:
    """Triples: source, instruction, result."""

    def card(item: Item) -> Html:
        marks: list[Mark] = [(bool(_value(evaluation, item, "change_done")), "change")]
        outside_db = _value(evaluation, item, "psnr_outside_db")
        if outside_db is not None:
            marks.append((None, f"{outside_db:.1f} dB outside"))
        roles = [("source", "source"), ("result", "result")]
        return _card(evaluation, item, roles, f"“{_text(item, 'instruction')}”", marks)

    return _groups(evaluation, card, MAX_EDITS, 284)


def inlined(image: Image.Image, alt: str, min_px: int, max_px: int) -> Html:
    """An <img> with the image's bytes inside: at most `max_px` a side; up to `min_px` enlarged, pixel by pixel.

    Small images are PNG; larger ones are JPEG, at a tenth of PNG's size.
    """
    image.thumbnail((max_px, max_px))
    is_small = max(image.size) <= min_px
    scale = max(1, min_px // max(image.size))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG" if is_small else "JPEG", quality=88)
    return fill(
        _IMAGE,
        kind="png" if is_small else "jpeg",
        payload=base64.b64encode(buffer.getvalue()).decode(),
        width=image.width * scale,
        height=image.height * scale,
        alt=alt,
    )


def grid(cards: Sequence[Html], cell_px: int) -> Html:
    """Figures side by side, each at least `cell_px` wide."""
    return fill(_GRID, cards=cards, cell_px=cell_px)


def strip(evaluation: Evaluation, item: Item, roles: Sequence[tuple[str, str]]) -> Html:
    """An item's images, each with its label."""
    return fill(_STRIP, shown=[(_image(evaluation, item, role), label) for role, label in roles])


def _groups(evaluation: Evaluation, card: Callable[[Item], Html], max_shown: int, cell_px: int) -> Html:
    """The first items of every group, under the group's name."""
    sections = []
    for group, items in evaluation.groups().items():
        cards = [card(item) for item in items[:max_shown]]
        shown = f"the first {len(cards)} of {len(items)}" if len(cards) < len(items) else f"all {len(items)}"
        title = f"{group.replace('_', ' ').capitalize() or 'All'} · {shown}"
        sections += [fill("<h3>{{ title }}</h3>", title=title), grid(cards, cell_px)]
    return together(sections)


def _card(
    evaluation: Evaluation, item: Item, roles: Sequence[tuple[str, str]], text: str, marks: Sequence[Mark]
) -> Html:
    """Images, the requested text and the marks; with a cross among the marks, also what the judge saw instead."""
    seen = ""
    if any(right is False for right, _ in marks):
        detail = evaluation.per_item[item.key]["detail"]
        seen = f"{', '.join(detail.get('seen', ())) or 'nothing'} on {detail.get('background', '–')}"
    return fill(_CARD, strip=strip(evaluation, item, roles), text=text, marks=marks, seen=seen)


def _image(evaluation: Evaluation, item: Item, role: str) -> Html:
    assert evaluation.images is not None
    path = evaluation.images.path(item, role)
    if not files.is_file(path):
        return fill('<span class="absent">image is gone</span>')
    return inlined(read_rgb_file(path), f"{role} of {item.key}", MAX_SMALL_PX, MAX_PX)


def _value(evaluation: Evaluation, item: Item, name: str) -> Any:
    """The item's number or yes-or-no value called `name`; None without one."""
    value = evaluation.per_item[item.key]["values"].get(name)
    return None if isinstance(value, list) else value


def _text(item: Item, field: str) -> str:
    """The caption or instruction that was used: `field`, or the first text of its plural."""
    several = item.meta.get(f"{field}s")
    first = several[0] if isinstance(several, list) and several else ""
    return str(item.meta.get(field) or first)
