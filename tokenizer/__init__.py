"""Pixels <-> latents: RPiAE, its three training stages, and encoding of shards."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
