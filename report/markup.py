"""The one place that makes HTML and SVG: templates escape every value except markup made here.

A template is a constant of the module that uses it (Jinja2's language). Attributes stand in double quotes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup as Html

from report.style import LIGHT

__all__ = ["Html", "absent", "document", "facts", "fill", "section", "together", "vector", "whole"]

_TEMPLATES = Environment(
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_DOCUMENT = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
{%- if refresh_s %}<meta http-equiv="refresh" content="{{ '%g' | format(refresh_s) }}">{% endif %}
<meta name="viewport" content="width=device-width, initial-scale=1">\
<title>{{ title }}</title><style>{{ style }}</style></head>
<body>{{ body }}</body></html>
"""
_SECTION = """\
<section><h2>{{ title }}</h2>{% if lead %}<p class="soft">{{ lead }}</p>{% endif %}{{ body }}</section>
"""
_FACTS = "<dl>{% for name, value in pairs %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>"

_DRAWING = """\
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">{{ drawing }}</svg>"""
_PATH = re.compile(r' d="([^"]*)"')
_HUNDREDTHS = re.compile(r"(?<=\.\d)\d+")


def fill(template: str, **values: object) -> Html:
    """Fills `template`, a constant, with `values`. Values are escaped, except markup that `fill` made."""
    return Html(_compiled(template).render(values))  # noqa: S704  # autoescape is on


def together(parts: Iterable[object]) -> Html:
    """Joins the parts; a part is escaped unless it was made here."""
    return Html("").join(parts)  # type: ignore[arg-type]  # join escapes every part without __html__


def section(title: str, body: Html, lead: str = "") -> Html:
    """A heading, a sentence about the body, and the body."""
    return fill(_SECTION, title=title, body=body, lead=lead)


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values below each other."""
    return fill(_FACTS, pairs=list(pairs))


def absent(text: str) -> Html:
    """A note in the place of something that does not exist."""
    return fill('<p class="absent">{{ text }}</p>', text=text)


def document(title: str, style: str, body: Html, refresh_s: float | None = None) -> str:
    """A whole page. `style`: our own CSS, a constant; `refresh_s`: seconds after which a browser reloads the page."""
    css = Html(style)  # noqa: S704  # a constant
    return whole(fill(_DOCUMENT, title=title, style=css, body=body, refresh_s=refresh_s))


def vector(svg: str, size: tuple[int, int], label: str, titles: Mapping[str, str]) -> Html:
    """A drawing of matplotlib's, without text of people, as an element of a page and in its colours.

    `size`: width and height in px; `titles`: tooltips by the ids of the drawing's parts.
    """
    drawing = svg[svg.index('<g id="figure_1">') : svg.rindex("</g>") + 4]
    for name, colour in LIGHT.items():
        drawing = drawing.replace(f": {colour}", f": var(--{name})")
    drawing = _PATH.sub(lambda path: _HUNDREDTHS.sub("", path[0].replace("\n", "")), drawing)
    for part, title in titles.items():
        tooltip = fill("<g><title>{{ title }}</title>", title=title)
        drawing = drawing.replace(f'<g id="{part}">', tooltip)
    made = Html(re.sub(r'(?<=<g) id="[^"]*"|\n *', "", drawing))  # noqa: S704  # numbers, and what fill made
    return fill(_DRAWING, width=size[0], height=size[1], label=label, drawing=made)


def whole(made: Html) -> str:
    """The page as plain text for a file. Lone surrogates become question marks, as UTF-8 cannot encode them."""
    return str(made).encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    return _TEMPLATES.from_string(template)
