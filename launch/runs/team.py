"""The processes of one evaluation: all ranks under the deepspeed launcher, this one alone without it."""

from __future__ import annotations

import os

import torch

from engine import distributed
from evaluation.runner import ALONE, Team

WAIT_S = 7 * 86400
"""Ranks that are done wait for those that are not, with nothing between."""


def meet() -> tuple[Team, str]:
    """The team and this process's device; leave with engine.distributed.stop. Raises UserError: ranks do not meet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, own_device()
    ranks = distributed.start(WAIT_S)
    return Team(ranks.rank, ranks.world, ranks.barrier, ranks.gather), str(ranks.device)


def own_device() -> str:
    """This process's device, where it works alone."""
    return "cuda" if torch.cuda.is_available() else "cpu"
