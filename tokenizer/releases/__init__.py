"""Weights that others published -> our exports: their names are translated, every tensor is accounted for."""
