"""Ranks that compute together until one of them cannot go on: run by test_endings.py."""

import argparse
import os
import signal
import sys
import time

import torch.distributed as dist

from base.config import StoppedError, UserError
from engine import distributed
from launch.runs import entry

ERRORS = {
    "mistake": UserError("no such label"),
    "bug": IndexError("list index"),
    "stop": StoppedError("saved"),
    "usage": SystemExit(2),  # what argparse does with words that it does not know
}

LATE_S = 3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--error", choices=(*ERRORS, "killed"))
    parser.add_argument("--ranks", type=int, nargs="+", help="that fail")
    parser.add_argument("--before-they-meet", action="store_true")
    parser.add_argument(
        "--late", type=int, nargs="+", default=[], help="ranks that come LATE_S after the others"
    )
    parser.add_argument("--others", choices=("collective", "asleep", "apart"), default="collective")
    args = parser.parse_args()
    fails = int(os.environ["RANK"]) in args.ranks
    if fails and args.before_they_meet:
        raise ERRORS[args.error]
    if int(os.environ["RANK"]) in args.late:
        time.sleep(LATE_S)
    ranks = distributed.start()
    group = dist.new_group(ranks=[r for r in range(ranks.world) if r not in args.ranks] or None)
    ranks.barrier()
    if fails and args.error == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fails:
        raise ERRORS[args.error]
    if args.others == "collective":
        ranks.barrier()  # with those that fail
    if args.others == "apart":
        while True:  # as ranks of NCCL, which notice no lost connection
            dist.barrier(group=group)
    time.sleep(600)


if __name__ == "__main__":
    sys.exit(entry.run(main))
