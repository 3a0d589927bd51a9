"""The miniature: the whole pipeline on one small machine, with data, encoder and judge of its own."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
