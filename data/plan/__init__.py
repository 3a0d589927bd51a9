"""The order of samples on any number of ranks, and a run's position in that order."""
