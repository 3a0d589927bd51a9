"""Pixel shards -> latent shards on all ranks: deepspeed --num_gpus 8 launch/encode_latents.py --config FILE"""

import dataclasses
import sys

from launch.runs import entry
from launch.runs.configs import EncodeRun


def main() -> None:
    """Encodes the data sets. A repeated command continues where it stopped."""
    arguments = entry.config_parser(__doc__ or "", "configs/latents/cc12m.yaml").parse_args()
    run = entry.read_config(EncodeRun, arguments)
    if arguments.dry_run:
        entry.print_config(run)
        return
    entry.use_torch()
    from engine import distributed
    from tokenizer.encode import check_out, encode_shards

    for config in run.configs():
        check_out(config)  # before the ranks meet, so that a mistake is one line and not one a rank
    ranks = distributed.start()
    for config in run.configs():
        config = dataclasses.replace(config, device=str(ranks.device))
        encode_shards(config, rank=ranks.rank, world=ranks.world, barrier=ranks.barrier)
    distributed.stop()


if __name__ == "__main__":
    sys.exit(entry.run(main))
