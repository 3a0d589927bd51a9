"""The config of each kind of run, and what starts it."""
