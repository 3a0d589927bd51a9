"""The doctor's diagnosis as one self-contained page: no scripts, images inlined, captions escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data.captions import TEXT_FIELDS
from data.doctor import Diagnosis, Shown
from data.findings import Histogram, Table
from data.images import IMAGE_PARTS, decode_image
from data.inspection import normalised, stored_values
from data.shards import LatentInfo, Sample
from engine import files
from engine.config import UserError
from evaluation.report.charts import bar_chart
from evaluation.report.gallery import inlined
from evaluation.report.style import CSS

MAX_PX = 192  # long side of an image on the page
MIN_PX = 96  # smaller ones are shown larger, pixel by pixel
MAX_PROBLEMS = 200
MAX_TEXTS = 4  # captions of a sample
MAX_TEXT_CHARACTERS = 400
LATENT_RANGE = 2.5  # deviations from black to white
STYLE = """
table, svg.bars { max-width: 800px; }
.strip { flex-wrap: wrap; }
.problem { color: var(--bad); font-size: 13px; overflow-wrap: anywhere; }
ol.problems { padding-left: 28px; font-size: 14px; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
"""


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Writes the page. Raises UserError: a file there that is none of our pages."""
    files.write_page(path, page(diagnosis))


def page(diagnosis: Diagnosis) -> str:
    """The whole HTML document."""
    bad = [shown for shown in diagnosis.shown if shown.problems]
    good = [shown for shown in diagnosis.shown if not shown.problems]
    name = escape(Path(diagnosis.directory).resolve().name)
    sections = [_head(diagnosis, name), _problems(diagnosis)]
    sections += [_section(table.title, _table(table)) for table in diagnosis.tables]
    sections += [_section(histogram.title, _bars(histogram)) for histogram in diagnosis.histograms]
    sections.append(_section("Samples with problems", _cards(bad, diagnosis.latent)) if bad else "")
    lead = '<p class="soft">Those with the smallest hash of their key: a random choice, always the same.</p>'
    sections.append(_section("Samples", lead + _cards(good, diagnosis.latent)) if good else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: diagnosis</title><style>{CSS}{STYLE}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(diagnosis: Diagnosis, name: str) -> str:
    kind = "bad" if diagnosis.num_problems else "good"
    facts = [("folder", diagnosis.directory), *diagnosis.facts]
    return (
        f'<header><h1>{name}</h1><p class="lead"><span class="{kind}">'
        f"{escape(diagnosis.verdict)}</span></p></header>"
        f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts)}</dl>"
    )


def _problems(diagnosis: Diagnosis) -> str:
    """Problems and notes; nothing if there are none."""
    body = ""
    if diagnosis.num_problems:
        listed = diagnosis.problems[:MAX_PROBLEMS]
        items = "".join(f"<li>{escape(problem.text)}</li>" for problem in listed)
        more = diagnosis.num_problems - len(listed)
        body += _section(
            "Problems", f'<ol class="problems">{items}</ol>' + (f"<p>and {more:,} more</p>" * bool(more))
        )
    if diagnosis.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in diagnosis.notes)
        body += _section("Notes", f'<ul class="notes">{items}</ul>')
    return body


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    head = f"<thead><tr>{head}</tr></thead>" if any(table.header) else ""
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _bars(histogram: Histogram) -> str:
    """One bar says nothing that the summary does not."""
    bars = [(name, count, f"{count:,}") for name, count in histogram.bars]
    chart = bar_chart(bars, histogram.title) if len(bars) > 1 else ""
    return f"<p>{escape(histogram.summary)}</p>{chart}"


def _cards(shown: Sequence[Shown], latent: LatentInfo | None) -> str:
    cards = "".join(_card(one, latent) for one in shown)
    return f'<div class="grid-cards" style="--cell: {MAX_PX + 30}px">{cards}</div>'


def _card(shown: Shown, latent: LatentInfo | None) -> str:
    sample = shown.sample
    strip = "".join(f"<div>{picture}</div>" for picture in _pictures(sample, latent))
    texts = "".join(f"<div>{escape(text)}</div>" for text in _texts(sample))
    problems = "".join(f'<div class="problem">{escape(text)}</div>' for text in shown.problems)
    key = f'<span class="marks">{escape(sample.key)}</span>'
    return f'<figure><div class="strip">{strip}</div><figcaption>{texts}{key}{problems}</figcaption></figure>'


def _pictures(sample: Sample, latent: LatentInfo | None) -> Iterator[str]:
    for part in sorted(sample.parts):
        suffix = part.split(".")[-1]
        try:
            if suffix in IMAGE_PARTS:
                yield _img(decode_image(sample, part), part)
            elif suffix == "latent" and latent is not None:
                yield _img(_latent_image(sample.parts[part], latent), part)
        except (UserError, ValueError):
            yield f'<span class="absent">{escape(part)} cannot be shown</span>'


def _latent_image(payload: bytes, latent: LatentInfo) -> Image.Image:
    """The first three channels of the first view as red, green, blue. Raises ValueError: another size, not finite."""
    z_CYX = normalised(stored_values(payload, latent)[0, 0], latent)[:3]
    if not np.isfinite(z_CYX).all():
        raise ValueError("not finite")
    levels = np.clip((z_CYX / LATENT_RANGE + 1) * 127.5, 0, 255).astype(np.uint8)
    channels = [levels[min(c, len(levels) - 1)] for c in range(3)]
    return Image.fromarray(np.stack(channels, -1))


def _img(image: Image.Image, part: str) -> str:
    return f'{inlined(image, part, MIN_PX, MAX_PX)}<span class="role">{escape(part)}</span>'


def _texts(sample: Sample) -> list[str]:
    """The sample's captions, or its class; as much as fits."""
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
