"""What every folder may import: configs, files, what is printed and what is trained."""

import os

# Before anything loads OpenMP: its threads wait for each other by spinning, and beside a busy process that costs
# seventy times the work (2 threads on 2 cores, 200 small forward passes: 202 s, asleep 2.9 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FOLDERS = ("base", "data", "tokenizer", "generator", "evaluation", "report", "engine", "launch", "quickstart")
"""Of the source, each of its own top-level package."""
