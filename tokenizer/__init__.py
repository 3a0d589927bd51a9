"""Pixels <-> latents: RPiAE, its three training stages, and encoding of shards."""

import engine  # noqa: F401  # before torch: engine/__init__.py says how its threads wait
