"""Packed batches -> latents: the Bagel-MoT generator, flow matching and sampling."""
