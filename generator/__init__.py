"""Packed batches -> latents: the Bagel-MoT generator, flow matching and sampling."""

import base  # noqa: F401  # before torch: base/__init__.py says how its threads wait
