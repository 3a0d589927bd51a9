"""The one place where HTML and SVG are made: templates whose values are escaped, all but what was made here.

A template is a constant of the module that uses it (Jinja2's language). Attributes stand in double quotes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup as Html

__all__ = ["Html", "document", "fill", "together"]

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


def fill(template: str, **values: object) -> Html:
    """`template`, a constant, with `values` escaped; what `fill` has made stays as it is."""
    return Html(_compiled(template).render(values))  # noqa: S704  # autoescape is on


def together(parts: Iterable[object]) -> Html:
    """One after the other, each escaped unless it was made here."""
    return Html("").join(parts)  # type: ignore[arg-type]  # it escapes whatever has a text


def document(title: str, style: str, body: Html, refresh_s: float | None = None) -> str:
    """A whole page. `style`: CSS of ours, a constant; `refresh_s`: a browser loads it again after so many seconds."""
    return fill(_DOCUMENT, title=title, style=Html(style), body=body, refresh_s=refresh_s)  # noqa: S704  # CSS of ours


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> Template:
    return _TEMPLATES.from_string(template)
