"""Estimates of a run's memory, time and storage before its start, and measurements of one step."""
