"""Imports published weights as our exports: parameter names are translated, every tensor is accounted for."""
