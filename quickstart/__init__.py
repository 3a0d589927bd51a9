"""The miniature: the whole pipeline on one small machine, with its own data, encoder and judge."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
