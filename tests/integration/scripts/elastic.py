"""Checkpoints between numbers of ranks and ZeRO stages: run by test_elastic.py on 1, 2 or 3 ranks.

Each case is FROM>TO:ZERO:PRECISION:OPTIMIZER. A model is built from another seed, restored from folder FROM ("new": not
at all, but trained for 3 steps), compared by DeepSpeed's own accessors, saved as TO, and trained for 2 more steps.
Prints one JSON line a case; the whole values are written to TO.pt.
"""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from torch import nn

from base.objective import LossOutput
from engine import deepspeed_engine, distributed
from engine.checkpoint import Checkpoints
from engine.ema import Ema
from engine.engine_config import OptimizerConfig

STREAMS = 6
DECAYS = (0.9, 0.5)


class Net(nn.Module):
    """Sizes that nothing divides, a frozen parameter, a tied one, and a buffer that moves with every step."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.layers = nn.Sequential(
            nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 7)
        )
        self.tied = self.layers[0].weight
        self.tiny = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def loss(self, x, step):
        self.seen += 1
        return LossOutput((self.layers(x) + self.tiny - x.flip(-1)).float().square().sum())


class Case:
    def __init__(self, name, root, ranks, seed):
        self.source, _, rest = name.partition(">")
        self.target, zero, self.precision, optimizer = rest.split(":")
        self.root, self.ranks, self.accumulation = root, ranks, STREAMS // ranks.world
        torch.manual_seed(seed)
        self.net = Net().to(ranks.device)
        self.engine = deepspeed_engine.build_engine(
            deepspeed_engine.Forward(self.net, self.net.loss, self.precision),
            OptimizerConfig(lr=1e-2, name=optimizer),
            zero_stage=int(zero),
            precision=self.precision,
            accumulation_steps=self.accumulation,
        )
        self.ema = Ema(self.engine, DECAYS)
        self.step = 0

    def checkpoints(self, name):
        parts = {"main": self.engine}
        return Checkpoints(self.root / name, parts, self.ema, self.ranks, keep=2, say=print)

    def train(self, num_steps):
        losses = []
        for _ in range(num_steps):
            total = torch.zeros(())
            for micro in range(self.accumulation):
                stream = micro * self.ranks.world + self.ranks.rank
                generator = torch.Generator().manual_seed(self.step * STREAMS + stream)
                x = torch.randn(4, 7, generator=generator).to(self.ranks.device)
                sums, _ = self.engine(x.bfloat16() if self.precision == "bf16" else x, self.step)
                loss = sums[""]
                self.engine.backward(loss * self.ranks.world / 24, scale_wrt_gas=False)
                self.engine.step()
                total += loss.detach().cpu() / 24
            losses += self.ranks.sum([float(total)])
            self.ema.update(self.engine, self.step)
            self.step += 1
        return losses

    def values(self):
        """Whole tensors as DeepSpeed itself puts them together from the ranks; Muon's momentum by our layout."""
        found = {
            "seen": self.net.seen.cpu().clone(),
            "step": torch.tensor(deepspeed_engine.optimizer_step(self.engine)),
        }
        if hasattr(self.engine.optimizer, "_hp_optimizer_states_linked"):
            # DeepSpeed links the states after the first group's first step, when the other groups have none yet.
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            found[f"{name} master"] = deepspeed.utils.safe_get_full_fp32_param(parameter)
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"{name} model"] = parameter.detach().float().clone()
            if getattr(parameter, "use_muon", False):
                found[f"{name} momentum"] = self.momentum(name, parameter)
                continue
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {kind}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
        for decay, shadow in self.ema.shadows.items():
            with deepspeed_engine.swapped(self.engine, shadow):
                for name, parameter in self.engine.module.named_parameters():
                    if parameter.requires_grad:
                        average = deepspeed.utils.safe_get_full_fp32_param(parameter)
                        found[f"{name} ema {decay}"] = average
        return {name: value.detach().cpu().clone() for name, value in found.items()}

    def momentum(self, wanted, parameter):
        whole = torch.full((getattr(parameter, "ds_numel", parameter.numel()),), float("nan"))
        mine = [
            (segment.start, state["momentum_buffer"][segment.offset : segment.offset + segment.length].cpu())
            for state, segments in zip(
                deepspeed_engine.states(self.engine),
                deepspeed_engine.momentum_segments(self.engine),
                strict=True,
            )
            for segment in segments
            if segment.parameter == wanted
        ]
        for pieces in self.ranks.gather(mine):
            for start, values in pieces:
                whole[start : start + len(values)] = values.float()
        return whole


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--root", type=Path)
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    ranks = distributed.start()
    for number, name in enumerate(args.cases):
        case = Case(name, args.root, ranks, seed=0 if name.startswith("new") else 1 + number)
        if case.source == "new":
            case.train(3)
        else:
            loaded = case.checkpoints(case.source).load({})
            assert loaded is not None
            case.step = loaded[1]["step"]
        values = case.values()
        state = {"step": case.step, "fingerprints": {}, "data": {}}
        case.checkpoints(case.target).save(state, background=False, required=True)
        losses = case.train(2)
        if ranks.is_first:
            torch.save(values, args.root / f"{case.target}.pt")
            print(json.dumps({"case": name, "losses": losses}), flush=True)
        case.engine.destroy()
    distributed.stop()


if __name__ == "__main__":
    main()
