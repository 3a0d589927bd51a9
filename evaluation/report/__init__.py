"""The report of a run: one self-contained HTML page for people, one JSON file for machines."""

from evaluation.report.page import render_report

__all__ = ["render_report"]
