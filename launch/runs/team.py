"""The processes of one evaluation: all ranks under the deepspeed launcher, otherwise this process alone."""

from __future__ import annotations

import os

import torch

from base.team import ALONE, Team
from engine import distributed

WAIT_S = 7 * 86400
"""How long finished ranks wait for the others: a whole evaluation may lie between two collectives."""


def meet() -> tuple[Team, str]:
    """Joins the ranks: the team and this process's device. End with engine.distributed.stop. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, own_device()
    ranks = distributed.start(WAIT_S)
    return Team(ranks.rank, ranks.world, ranks.barrier, ranks.gather), str(ranks.device)


def own_device() -> str:
    """The device of a process that works alone."""
    return "cuda" if torch.cuda.is_available() else "cpu"
