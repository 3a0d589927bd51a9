"""Suites that score the miniature's images."""
