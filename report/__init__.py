"""Pages for people, made from scores, runs and data sets."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
from report.page import render_report

__all__ = ["render_report"]
