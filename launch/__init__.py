"""Entry points: each parses a config, composes the parts, and calls them."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
