"""Suites: what is measured on each kind of image set."""
