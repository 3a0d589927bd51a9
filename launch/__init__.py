"""Entry points: each parses a config, composes the parts, and calls them."""

import engine  # noqa: F401  # before torch: engine/__init__.py says how its threads wait
