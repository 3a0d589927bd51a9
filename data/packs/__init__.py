"""Samples -> batches: packs and their attention plans, batches of class labels and latents, copies to a GPU."""
