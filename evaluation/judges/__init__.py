"""Classifiers that look at generated images."""
