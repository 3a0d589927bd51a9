"""A whole training on a linear model with a discriminator, in seconds: run by test_engine.py on one or more ranks."""

import argparse
import errno
import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from base.config import UserError, to_dict
from base.objective import LossOutput, Term
from engine import distributed, peers
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.job_endings import LOST_CONTACT
from engine.loop import train

WIDTH = 6
SPIKE = 1000.0


@dataclass
class ToyBatch:
    x: torch.Tensor
    sample_ids: tuple[str, ...]

    def to(self, device):
        return ToyBatch(self.x.to(device), self.sample_ids)


class Phases:
    """Says in a file, and for long enough to be met there, whether this rank reads data, or is in which pass."""

    def __init__(self, path):
        self.descriptor = None if path is None else os.open(path, os.O_CREAT | os.O_WRONLY)

    def __call__(self, name):
        if self.descriptor is not None:
            os.pwrite(self.descriptor, name.ljust(8).encode(), 0)
            time.sleep(0.005)
            if name == "backward":
                os.pwrite(self.descriptor, b"between ", 0)


class ToySource:
    """Step k, stream s: a batch that depends on nothing else, of a size that differs between packs."""

    def __init__(self, num_streams, rank, world, poison_step, spike_step, phases):
        self.phases = phases
        self.num_streams, self.poison_step, self.spike_step = num_streams, poison_step, spike_step
        self.streams = range(rank, num_streams, world)
        self.step = 0

    def next_step(self):
        self.phases("data")
        batches = []
        for stream in self.streams:
            rng = np.random.Generator(np.random.Philox(key=[self.step, stream]))
            x = torch.from_numpy(rng.standard_normal((2 + (self.step + stream) % 3, WIDTH))).float()
            if self.step == self.poison_step and stream == 0:
                x[0, 0] = float("nan")
            if self.step == self.spike_step:
                x *= SPIKE
            batches.append(ToyBatch(x, (f"{self.step}-{stream}",)))
        self.step += 1
        return batches

    def state_dict(self):
        return {"fingerprint": "toy", "streams": {str(s): {"step": self.step} for s in self.streams}}

    def load_state_dict(self, state):
        self.step = state["streams"][str(self.streams[0])]["step"]

    def metrics(self):
        return {"samples": float(len(self.streams))}

    def close(self):
        pass


class ToyObjective:
    name = "toy"

    def __init__(self, started_from, adversarial, drift_step, rank, hidden, phases):
        self.phases = phases
        self.drifts = drift_step if rank == 1 else -1
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))
        self.critic = nn.Linear(WIDTH, 1)
        self.adversary = self.critic if adversarial else None
        self.started_from = started_from

    def to(self, device):
        self.model.to(device)
        self.critic.to(device)

    def count(self, batch):
        return len(batch.x)

    def further_counts(self, batch):
        return {"positive": int((batch.x[:, 0] > 0).sum())}  # differs between batches and ranks

    def loss(self, batch, step):
        self.phases("forward")
        fake = self.model(batch.x)
        rec = (fake - batch.x).square().sum()
        # A gradient towards an inner tensor, as the adaptive weights need it.
        (inner,) = torch.autograd.grad(self.critic(fake).sum(), fake, retain_graph=True)
        fake.register_hook(lambda _: self.phases("backward"))
        further = {"positive": Term(fake[batch.x[:, 0] > 0].square().sum(), 0.1)}
        return LossOutput(
            rec + 0.01 * (fake * inner).sum(), {"rec": rec.detach()}, fake.detach(), further, flops=1e6
        )

    def adversary_active(self, step):
        return self.adversary is not None and step >= 2

    def adversary_loss(self, fake, step):
        return LossOutput(torch.relu(1 + self.critic(fake)).sum())

    def samples(self):
        value = self.model(torch.ones(1, WIDTH, device=next(self.model.parameters()).device))
        return np.full((8, 8, 3), int(value.abs().sum()) % 256, dtype=np.uint8)

    def export(self, directory):
        content = io.BytesIO()
        torch.save({k: v.clone() for k, v in self.model.state_dict().items()}, content)
        (directory / "model.pt").write_bytes(content.getvalue())

    def alarms(self, history):
        if history[-1]["step"] == self.drifts:  # after the update that would have overwritten it
            with torch.no_grad():
                self.critic.weight[0, 0] += 1e-6
        return ["the loss exploded"] if history[-1]["loss"] > SPIKE else []

    def fingerprints(self):
        return {"initial weights": self.started_from}


class ToyEvaluation:
    """The first rank takes its time; the others wait."""

    def __init__(self, model, every_steps, seconds, fails_at, ranks):
        self.model, self.every_steps, self.seconds, self.fails_at = model, every_steps, seconds, fails_at
        self.ranks = distributed.patient(ranks, 60)

    def run(self, step):
        if step == self.fails_at:
            raise UserError("no judge answers")
        output = self.model(torch.ones(1, WIDTH)).sum().item()
        time.sleep(self.seconds if self.ranks.is_first else 0)
        self.ranks.barrier()
        assert not self.model.training
        return {"toy/output": output, "toy/undefined": float("nan")} if self.ranks.is_first else {}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument(
        "--hidden", type=int, default=8, help="width of the model: how long a checkpoint takes"
    )
    parser.add_argument("--ema", type=float, nargs="+", default=[0.9])
    parser.add_argument("--poison-step", type=int, default=-1)
    parser.add_argument("--max-nonfinite", type=int, default=3)
    parser.add_argument("--spike-step", type=int, default=-1, help="data step with huge values")
    parser.add_argument("--on-alarm", default="warn")
    parser.add_argument("--max-roll-backs", type=int, default=3)
    parser.add_argument("--drift-step", type=int, default=-1, help="rank 1 changes its critic at this step")
    parser.add_argument("--checkpoint-every", type=int, default=3)
    parser.add_argument("--async-checkpoint", action="store_true", help="which step is saved is then a race")
    parser.add_argument("--phases", type=Path, help="folder for what each rank is doing")
    parser.add_argument("--kill-after", type=int, default=-1)
    parser.add_argument("--fault-step", type=int, default=-1, help="data step at which --fault happens")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--fault-rank", type=int, default=1)
    parser.add_argument(
        "--full", type=int, nargs=2, metavar=("FROM", "UNTIL"), help="data steps: no room to write"
    )
    parser.add_argument("--fail-export", action="store_true", help="there is no room for an export")
    parser.add_argument("--sample-every", type=int, default=0)
    parser.add_argument("--export-at", type=int, nargs="*", default=[])
    parser.add_argument("--hang-timeout", type=float, default=0.0)
    parser.add_argument("--on-loss-spike", default="ignore")
    parser.add_argument("--evaluate-every", type=int, default=0)
    parser.add_argument("--evaluation-seconds", type=float, default=0.0)
    parser.add_argument("--fail-evaluation-at", type=int, default=-1)
    parser.add_argument("--started-from", default="a")
    parser.add_argument(
        "--no-adversary", action="store_true", help="the critic is not trained (ZeRO-3 refuses it)"
    )
    args = parser.parse_args()
    ranks = distributed.start()
    phases = Phases(args.phases / str(ranks.rank) if args.phases else None)
    if args.phases:
        last_longer(Path, "rename")
    source = ToySource(args.streams, ranks.rank, ranks.world, args.poison_step, args.spike_step, phases)
    if args.kill_after >= 0:
        happen_at_step(source, args.kill_after, FAULTS["kill"])
    if args.fault and ranks.rank == args.fault_rank:
        happen_at_step(source, args.fault_step, FAULTS[args.fault])
    if args.full:
        for step, limit_bytes in zip(args.full, (0, resource.RLIM_INFINITY), strict=True):
            happen_at_step(source, step, functools.partial(limit_files, limit_bytes))
    config = EngineConfig(
        steps=args.steps,
        optimizer=OptimizerConfig(
            lr=1e-2,
            name=args.optimizer,
            warmup_steps=2,
            schedule="cosine",
            grad_clip=0.0 if args.optimizer == "muon" else 1.0,
        ),
        adversary_optimizer=OptimizerConfig(lr=1e-2),
        precision=args.precision,
        zero_stage=args.zero,
        ema_decay=tuple(args.ema),
        log_every_steps=1,
        checkpoint_every_steps=args.checkpoint_every,
        async_checkpoint=args.async_checkpoint,
        sample_every_steps=args.sample_every,
        export_at_steps=tuple(args.export_at),
        max_nonfinite_steps=args.max_nonfinite,
        on_alarm=args.on_alarm,
        max_roll_backs=args.max_roll_backs,
        on_loss_spike=args.on_loss_spike,
        hang_timeout_s=args.hang_timeout,
        wandb="disabled",
    )
    objective = ToyObjective(
        args.started_from, not args.no_adversary, args.drift_step, ranks.rank, args.hidden, phases
    )
    if args.fail_export:
        objective.export = no_room
    evaluation = None
    if args.evaluate_every:
        evaluation = ToyEvaluation(
            objective.model, args.evaluate_every, args.evaluation_seconds, args.fail_evaluation_at, ranks
        )
    try:
        train(
            objective,
            source,
            config,
            run_dir=args.run,
            resolved={"engine": to_dict(config), "started_from": args.started_from},
            ranks=ranks,
            evaluation=evaluation,
        )
    except UserError as error:
        if ranks.is_first:
            print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:  # as launch.runs.entry does
        if peers.lost_contact(error) is None:
            raise
        raise SystemExit(LOST_CONTACT) from error
    if ranks.is_first:
        print(json.dumps({"done": True}), flush=True)
    distributed.stop()


def last_longer(owner, name):
    """Makes a function take long enough to be met in it."""
    function = getattr(owner, name)

    def wrapped(*arguments):
        time.sleep(0.02)
        return function(*arguments)

    setattr(owner, name, wrapped)


def happen_at_step(source, step, fault):
    next_step = source.next_step

    def wrapped():
        if source.step == step:
            fault()
        return next_step()

    source.next_step = wrapped


def no_room(directory):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_files(limit_bytes):
    """From here on every write of this process to a file fails (EFBIG), whoever does it, or none."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


FAULTS = {
    # From inside: no handler runs, nothing is flushed.
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "delete": lambda: shutil.rmtree(sys.argv[sys.argv.index("--run") + 1]),
    "exhaust": lambda: torch.empty(1 << 60, dtype=torch.uint8),
}


if __name__ == "__main__":
    main()
