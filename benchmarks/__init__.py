"""Measurements: ratios against a named peer or limit, taken in one run, printed with the machine."""
