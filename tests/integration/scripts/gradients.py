"""Steps of the loop's Stepper, by ZeRO stage and precision: run by test_gradients.py on 1 to 3 ranks.

Each case is PRECISION:ZERO:STREAMS:BUCKET. It takes STEPS in turn and saves to CASE:RANKS.pt, for each, the weights
before it, the gradients that the optimizers saw, the norms that DeepSpeed reported, whether it was taken, and how often
the host waited for the device; at last the fp32 master weights. The test shares the packs and the model.
"""

import argparse
import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from base.objective import LossOutput, Term
from engine import deepspeed_engine, distributed, gradient_exchange
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.metric_window import Window
from engine.spans import Spans
from engine.step import Stepper

WIDTH, PROBES = 7, 16
CLIP = 22.0
STEPS = ("small", "clipped", "nonfinite", "small", "spike", "small")
SCALES = {"small": 1.0, "clipped": 6.0, "nonfinite": 1.0, "spike": 1.0}
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, grad_clip=CLIP)
ADVERSARY_OPTIMIZER = OptimizerConfig(lr=3e-3)


@dataclass
class Pack:
    x: torch.Tensor
    num_text: int
    """The first rows."""
    stream: int
    sample_ids: tuple = ()

    def to(self, device_or_dtype):
        return Pack(self.x.to(device_or_dtype), self.num_text, self.stream)


def packs(step, num_streams):
    """One pack of each stream: rows of its own number, in some no text, in some nothing else."""
    found = []
    for stream in range(num_streams):
        generator = torch.Generator().manual_seed(100 * step + stream)
        num_rows = 1 + (step + 3 * stream) % 5
        x = torch.randn(num_rows, WIDTH, generator=generator) * SCALES[STEPS[step]]
        if STEPS[step] == "nonfinite" and stream == num_streams // 2:
            x[0, 0] = float("nan")
        found.append(Pack(x, (step + stream) % (num_rows + 1), stream))
    return found


class Net(nn.Module):
    """Sizes that nothing divides, a frozen, a tied and a lonely parameter, an expert that some packs give no row, and
    `probe`, of which each stream has a value of its own, with the gradient 1.
    """

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.first, self.expert = nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 11, bias=False)
        self.layers = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, WIDTH))
        self.tied = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.probe = nn.Parameter(torch.zeros(PROBES))

    def forward(self, x, num_text):
        h = torch.cat([self.first(x[:num_text]), self.expert(x[num_text:])]).tanh()
        return self.layers(h) * self.scale + self.frozen


def loss_sums(net, pack):
    """The loss's sum over the pack's rows, and that of its further term."""
    y = net(pack.x, pack.num_text)
    rec = (y.to(pack.x.dtype) - pack.x).square().sum()
    further = y[: pack.num_text].to(pack.x.dtype).square().sum()
    probe = net.probe[pack.stream % PROBES].to(pack.x.dtype)  # no product in bf16
    return rec + probe * (4.0 * len(pack.x)), further, y


class Toy:
    """The objective; its adversary has an engine of its own unless `adversarial` is false (ZeRO-3)."""

    name = "toy"

    def __init__(self, adversarial):
        torch.manual_seed(0)
        self.model = Net()
        self.critic = nn.Linear(WIDTH, 1)
        self.adversary = self.critic if adversarial else None

    def count(self, pack):
        return len(pack.x)

    def further_counts(self, pack):
        return {"text": pack.num_text}

    def loss(self, pack, step):
        rec, further, y = loss_sums(self.model, pack)
        # A gradient towards an inner tensor, as the adaptive weights need it.
        (inner,) = torch.autograd.grad(rec, y, retain_graph=True)
        assert inner.shape == y.shape
        return LossOutput(rec, {"rec": rec.detach()}, y.detach(), {"text": Term(further, 0.25)})

    def adversary_active(self, step):
        return self.adversary is not None

    def adversary_loss(self, y, step):
        return LossOutput(critic_sum(self.critic, y))


def critic_sum(critic, y):
    return (1 + critic(y)).to(torch.promote_types(y.dtype, torch.float32)).square().sum()


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device: a value that is read, and the accelerator's synchronize."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.num += args[0].dtype != torch.float64  # these are the control group's, which no device knows
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        from deepspeed.accelerator import get_accelerator

        self.accelerator = get_accelerator()
        self.accelerator.synchronize = self.synchronize
        return super().__enter__()

    def __exit__(self, *error):
        del self.accelerator.synchronize
        return super().__exit__(*error)

    def synchronize(self, *_):
        self.num += 1


class Case:
    def __init__(self, name, ranks):
        self.precision, zero, streams, bucket = name.split(":")
        self.zero, self.num_streams, self.ranks = int(zero), int(streams), ranks
        deepspeed_engine.BUCKET_ELEMENTS = gradient_exchange.BUCKET_ELEMENTS = int(bucket)
        objective = Toy(adversarial=self.zero < 3)
        objective.model.to(ranks.device)
        objective.critic.to(ranks.device)
        config = EngineConfig(
            steps=len(STEPS),
            optimizer=OPTIMIZER,
            adversary_optimizer=ADVERSARY_OPTIMIZER,
            precision=self.precision,
            zero_stage=self.zero,
            on_loss_spike="skip",  # reads the loss: one wait
        )
        self.stepper = Stepper(objective, config, ranks, Spans(ranks.device), self.num_streams)
        self.engines = self.stepper.engines
        self.seen = {}
        for name, engine in self.engines.items():
            engine.optimizer.optimizer.register_step_pre_hook(self.recorder(name))

    def recorder(self, name):
        def record(optimizer, *_):
            for group in optimizer.param_groups:
                for shard in group["params"]:
                    self.seen[name][id(shard)] = shard.grad.detach().float().cpu().clone()

        return record

    def run(self):
        rows = []
        for step, kind in enumerate(STEPS):
            before = {name: self.weights(name) for name in self.engines}
            self.seen = {name: {} for name in self.engines}
            mine = packs(step, self.num_streams)[self.ranks.rank :: self.ranks.world]
            batches = [pack.to(self.ranks.device) for pack in mine]
            window = Window(self.ranks)
            means = []
            with Waits() as waits:
                outcome = self.stepper.take(
                    batches,
                    step,
                    window,
                    lambda mean, kind=kind, means=means: means.append(mean) or kind == "spike",
                )
            rows.append(
                {
                    "kind": kind,
                    "is_taken": outcome.is_taken,
                    "means": means,
                    "before": before,
                    "seen": {name: self.gradients(name) for name in self.engines if self.seen[name]},
                    "norms": {name: float(e.get_global_grad_norm()) for name, e in self.engines.items()},
                    "skipped": {name: e.skipped_steps for name, e in self.engines.items()},
                    "waits": waits.num,
                    "logged": window_values(window, outcome),
                }
            )
        return {"steps": rows, "masters": {name: self.masters(name) for name in self.engines}}

    def weights(self, name):
        """Of the model, as fp32, on every rank."""
        with deepspeed_engine.gathered(self.engines[name]):
            parameters = self.engines[name].module.module.named_parameters()
            return {key: value.detach().float().cpu().clone() for key, value in parameters}

    def gradients(self, name):
        engine = self.engines[name]
        return self.whole(engine, [self.seen[name][id(shard)] for shard in deepspeed_engine.shards(engine)])

    def masters(self, name):
        engine = self.engines[name]
        return self.whole(engine, [shard.detach().cpu() for shard in deepspeed_engine.shards(engine)])

    def whole(self, engine, shards):
        """Tensors by parameter, put together from all ranks' shards."""
        mine = [
            (
                segment.parameter,
                segment.start,
                shard[segment.offset : segment.offset + segment.length].clone(),
            )
            for shard, segments in zip(shards, deepspeed_engine.segments(engine), strict=True)
            for segment in segments
        ]
        shapes = deepspeed_engine.shapes(engine)
        flat = {name: torch.full(shape, float("nan")).flatten() for name, shape in shapes.items()}
        for pieces in self.ranks.gather(mine):
            for name, start, values in pieces:
                flat[name][start : start + len(values)] = values
        return {name.removeprefix("module."): flat[name].view(shapes[name]) for name in shapes}


def window_values(window, outcome):
    window.close_step(outcome.counts, {}, 1.0)
    return window.read()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--root", type=Path)
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    ranks = distributed.start()
    gc.freeze()  # DeepSpeed collects garbage for each engine, half a second among all that is imported
    for name in args.cases:
        case = Case(name, ranks)
        found = case.run()
        if ranks.is_first:
            torch.save(found, args.root / f"{name}:{ranks.world}.pt")
        for engine in case.engines.values():
            engine.destroy()
    distributed.stop()


if __name__ == "__main__":
    main()
