"""The doctor's diagnosis as one self-contained page: no scripts, images inlined, captions escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from base import files
from base.config import UserError
from data.doctor.examine_set import Diagnosis, Shown
from data.doctor.findings import Histogram
from data.doctor.sample_checks import normalised, stored_values
from data.samples.captions import TEXT_FIELDS
from data.samples.images import IMAGE_PARTS, decode_image
from data.shards import LatentInfo, Sample
from report.charts import bar_chart
from report.gallery import grid, inlined
from report.markup import Html, document, facts, fill, section, together
from report.style import CSS

MAX_PX = 192  # long side of an image on the page
MIN_PX = 96  # smaller images are shown larger, pixel by pixel
MAX_PROBLEMS = 200
MAX_TEXTS = 4  # captions shown of a sample
MAX_TEXT_CHARACTERS = 400
LATENT_RANGE = 2.5  # standard deviations from black to white
STYLE = """
table, .bars { max-width: 800px; }
.strip { flex-wrap: wrap; }
.problem { color: var(--bad); font-size: 13px; overflow-wrap: anywhere; }
ol.problems { padding-left: 28px; font-size: 14px; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
"""
_HEAD = """\
<header><h1>{{ name }}</h1><p class="lead"><span class="{{ kind }}">{{ verdict }}</span></p></header>{{ facts }}"""
_PROBLEMS = """\
<ol class="problems">{% for problem in listed %}<li>{{ problem.text }}</li>{% endfor %}</ol>
{% if more %}<p>and {{ more }} more</p>{% endif %}"""
_NOTES = '<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>'
_TABLE = """\
<div class="scroll"><table>
{% if header | select | list %}
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""
_CARD = """\
<figure><div class="strip">{% for picture in pictures %}<div>{{ picture }}</div>{% endfor %}</div><figcaption>
{%- for text in texts %}<div>{{ text }}</div>{% endfor -%}
<span class="marks">{{ key }}</span>
{%- for text in problems %}<div class="problem">{{ text }}</div>{% endfor -%}
</figcaption></figure>"""
LEAD = '<p class="soft">Those with the smallest hash of their key: a random choice, always the same.</p>{{ cards }}'


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the page. Raises UserError: the file exists and is not one of our pages."""
    files.write_page(path, page(diagnosis))


def page(diagnosis: Diagnosis) -> str:
    """The whole HTML document."""
    bad = [shown for shown in diagnosis.shown if shown.problems]
    good = [shown for shown in diagnosis.shown if not shown.problems]
    name = Path(diagnosis.directory).resolve().name
    sections = [_head(diagnosis, name), _problems(diagnosis)]
    sections += [
        section(table.title, fill(_TABLE, header=table.header, rows=table.rows)) for table in diagnosis.tables
    ]
    sections += [section(histogram.title, _bars(histogram)) for histogram in diagnosis.histograms]
    if bad:
        sections.append(section("Samples with problems", _cards(bad, diagnosis.latent)))
    if good:
        sections.append(section("Samples", fill(LEAD, cards=_cards(good, diagnosis.latent))))
    return document(f"{name}: diagnosis", CSS + STYLE, together(sections))


def _head(diagnosis: Diagnosis, name: str) -> Html:
    kind = "bad" if diagnosis.num_problems else "good"
    told = facts([("folder", diagnosis.directory), *diagnosis.facts])
    return fill(_HEAD, name=name, kind=kind, verdict=diagnosis.verdict, facts=told)


def _problems(diagnosis: Diagnosis) -> Html:
    """Problems and notes; nothing without any."""
    parts = []
    if diagnosis.num_problems:
        listed = diagnosis.problems[:MAX_PROBLEMS]
        more = diagnosis.num_problems - len(listed)
        parts.append(section("Problems", fill(_PROBLEMS, listed=listed, more=f"{more:,}" if more else "")))
    if diagnosis.notes:
        parts.append(section("Notes", fill(_NOTES, notes=diagnosis.notes)))
    return together(parts)


def _bars(histogram: Histogram) -> Html:
    """The histogram's summary, and its bars if there are several: one bar only repeats the summary."""
    bars = [(name, count, f"{count:,}") for name, count in histogram.bars]
    chart = bar_chart(bars, histogram.title) if len(bars) > 1 else ""
    return fill("<p>{{ summary }}</p>{{ chart }}", summary=histogram.summary, chart=chart)


def _cards(shown: Sequence[Shown], latent: LatentInfo | None) -> Html:
    return grid([_card(one, latent) for one in shown], MAX_PX + 30)


def _card(shown: Shown, latent: LatentInfo | None) -> Html:
    sample = shown.sample
    pictures = list(_pictures(sample, latent))
    return fill(_CARD, pictures=pictures, texts=_texts(sample), key=sample.key, problems=shown.problems)


def _pictures(sample: Sample, latent: LatentInfo | None) -> Iterator[Html]:
    for part in sorted(sample.parts):
        suffix = part.split(".")[-1]
        try:
            if suffix in IMAGE_PARTS:
                yield _img(decode_image(sample, part), part)
            elif suffix == "latent" and latent is not None:
                yield _img(_latent_image(sample.parts[part], latent), part)
        except (UserError, ValueError):
            yield fill('<span class="absent">{{ part }} cannot be shown</span>', part=part)


def _latent_image(payload: bytes, latent: LatentInfo) -> Image.Image:
    """The first view's first three channels as red, green, blue. Raises ValueError: another size, not finite."""
    z_CYX = normalised(stored_values(payload, latent)[0, 0], latent)[:3]
    if not np.isfinite(z_CYX).all():
        raise ValueError("not finite")
    levels = np.clip((z_CYX / LATENT_RANGE + 1) * 127.5, 0, 255).astype(np.uint8)
    channels = [levels[min(c, len(levels) - 1)] for c in range(3)]
    return Image.fromarray(np.stack(channels, -1))


def _img(image: Image.Image, part: str) -> Html:
    shown = inlined(image, part, MIN_PX, MAX_PX)
    return fill('{{ shown }}<span class="role">{{ part }}</span>', shown=shown, part=part)


def _texts(sample: Sample) -> list[str]:
    """The sample's captions, or its class; at most MAX_TEXTS."""
    try:
        tree = json.loads(sample.parts.get("json", b"{}"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(tree, dict):
        return []
    found = next((tree[name] for name in (*TEXT_FIELDS, "splits") if name in tree), None)
    if found is None:
        return [f"class {tree['label']} {tree.get('class', '')}".strip()] if "label" in tree else []
    if isinstance(found, dict):
        texts = [f"{kind}: {text}" for kind, text in found.items()]
    else:
        entries = found if isinstance(found, list) else [found]
        texts = [str(entry.get("text", entry) if isinstance(entry, dict) else entry) for entry in entries]
    cut = [
        text[:MAX_TEXT_CHARACTERS] + " ..." * (len(text) > MAX_TEXT_CHARACTERS) for text in texts[:MAX_TEXTS]
    ]
    return cut + [f"and {len(texts) - MAX_TEXTS} more"] * (len(texts) > MAX_TEXTS)
