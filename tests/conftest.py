"""Shared by all tests: one torch thread (with more, tiny models wait for each other on busy machines)."""

import torch

torch.set_num_threads(1)
