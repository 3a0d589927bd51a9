"""One real step of every phase of a tokenizer stage, before it is launched: deepspeed launch/preflight.py --config FILE

Random weights and random images: nothing is downloaded, and of an earlier stage's export only config.json is read. Run
it on the machine that will train. Prints time and highest memory of each phase: losses alone, with the discriminator's
update, with its loss; then samples, checkpoint and export.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from engine import distributed
from engine.config import UserError
from engine.loop import train
from launch import dry_run, entry
from launch.runs import TokenizerRun
from launch.synthetic import SyntheticPixels
from tokenizer.stages import build_untrained

PHASES = ("losses", "and the discriminator's update", "and its loss for the decoder")


def main() -> None:
    """Takes one step per phase with the real loop, in a temporary folder beside the run's."""
    arguments = entry.config_parser(__doc__ or "", "configs/tokenizer/pivot.yaml").parse_args()
    run = entry.read_config(TokenizerRun, arguments)
    if arguments.dry_run:
        print(dry_run.tokenizer_run(run))
        return
    stage = dataclasses.replace(
        run.stage, adaptive_pivot_start_step=0, gan_update_start_step=1, gan_loss_start_step=2
    )
    phases = PHASES if stage.gan is not None else PHASES[:1]
    engine = dataclasses.replace(
        run.engine,
        steps=len(phases),
        log_every_steps=1,
        checkpoint_every_steps=len(phases),
        sample_every_steps=0,
        on_alarm="warn",
        wandb="disabled",
    )
    ranks = distributed.start()
    if ranks.world > run.data.num_streams:
        raise UserError(f"{ranks.world} ranks, but data.num_streams is {run.data.num_streams}; raise it")
    source = SyntheticPixels(run.pixels, ranks.rank, ranks.world)
    objective = build_untrained(stage, source.pixels(run.num_preview_images))
    folder = Path(ranks.gather(_folder_beside(run.run_dir) if ranks.is_first else "")[0])
    try:
        train(objective, source, engine, run_dir=folder, resolved={}, ranks=ranks)
        after_gib = ranks.peak_memory_gib()
        if ranks.is_first:
            packs = (
                f"{source.num_streams} packs of {run.pixels.images_per_pack} images on {ranks.world} ranks"
            )
            kind = "allocated on a GPU" if ranks.device.type == "cuda" else "resident since the start"
            print(f"a step: {packs}; memory of the fullest rank, {kind}:")
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for phase, row in zip(phases, rows, strict=True):
                print(f"  {phase:32s} {row['step_s']:8.2f} s {row['memory_gib']:8.2f} GiB")
            print(f"  {'samples, checkpoint, export':32s} {'':10s} {after_gib:8.2f} GiB")
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    distributed.stop()


def _folder_beside(run_dir: str) -> str:
    """On the file system that the training will use: a checkpoint is gigabytes, and all nodes must see it."""
    parent = Path(run_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".preflight-", dir=parent)


if __name__ == "__main__":
    sys.exit(entry.run(main))
