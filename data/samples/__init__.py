"""Reads the parts of a sample: captions, images, latents, their layout, and text tokens."""
