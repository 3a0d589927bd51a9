"""Pixels <-> latents: RPiAE, its three training stages, and encoding of shards."""
