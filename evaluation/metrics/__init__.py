"""Metrics of images, with confidence intervals."""
