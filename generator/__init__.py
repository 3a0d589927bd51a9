"""Packed batches -> latents: the Bagel-MoT generator, flow matching and sampling."""

import engine  # noqa: F401  # before torch: engine/__init__.py says how its threads wait
