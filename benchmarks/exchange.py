"""Costs of a step's gradients beside its passes, by how they are summed and exchanged: python -m benchmarks.exchange

The benchmark runs every way that DeepSpeed offers for bf16 weights with sums in fp32, and ours, on 2 and on 4 ranks
(processes of this machine, gloo). It counts the bytes that a rank sends where DeepSpeed calls its backend (a ring's: an
all-reduce of n bytes over R ranks sends 2 n (R - 1) / R, every other collective n (R - 1) / R). At the dispatcher it
counts the bytes of memory that everything but the plain forward and backward pass reads and writes, and how often
the host waits for a value.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, LAYERS = 512, 8
CLIP = 1e-3


@dataclass(frozen=True)
class Way:
    """A ZeRO stage, and DeepSpeed's settings that differ from engine/deepspeed_engine.py's."""

    name: str
    zero_stage: int
    zero: dict[str, Any]
    ours: bool = False


WAYS = (
    Way("ZeRO-1, BF16_Optimizer", 1, {}),
    Way("ZeRO-1, engine/gradient_exchange.py", 1, {}, ours=True),
    Way("ZeRO-2, buckets all-reduced", 2, {"use_multi_rank_bucket_allreduce": True}),
    Way("ZeRO-2, reduced to their owners", 2, {}),
    Way("ZeRO-3", 3, {}),
)


class Counter(TorchDispatchMode):
    """Bytes read and written by operators, bytes sent by collectives, values read by the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = self.sent = 0.0
        self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.num_waits += 1
        elif func.namespace == "aten" and not func.is_view and "empty" not in func.__name__:
            written = {id(leaf) for leaf in tree_leaves(out)}
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            # An overwritten tensor is not read.
            read = leaves[1:] if "copy_" in func.__name__ or "zero_" in func.__name__ else leaves
            tensors = [*read, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))]
            if func.__name__.startswith("_foreach") and not written:
                tensors += leaves
            self.memory += sum(tensor.nbytes for tensor in tensors)
        return out

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Context that counts the collectives which DeepSpeed asks of its backend."""
        from deepspeed.comm import comm

        from engine.communication import COLLECTIVES

        backend, world = comm.cdb, torch.distributed.get_world_size()

        def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                tensors = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
                tensors += [[leaf] for leaf in kwargs.values() if isinstance(leaf, Tensor)]
                whole = max(sum(tensor.nbytes for tensor in each) for each in tensors)
                self.sent += whole * (world - 1) / world * (2 if name == "all_reduce" else 1)
                return function(*args, **kwargs)

            return call

        for name in COLLECTIVES:
            setattr(backend, name, counted(name, getattr(backend, name)))
        try:
            yield
        finally:
            for name in COLLECTIVES:
                delattr(backend, name)


def build(way: Way, num_packs: int) -> Any:
    """An engine around some linear layers, and its number of parameters."""
    import deepspeed

    from base.objective import LossOutput
    from engine import deepspeed_engine, gradient_exchange
    from engine.engine_config import OptimizerConfig

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    initialize, take_over = deepspeed.initialize, gradient_exchange.ShardedSums.take_over

    def with_settings(**arguments: Any) -> Any:
        arguments["config"]["zero_optimization"].update(way.zero)
        arguments["config"]["bf16"]["immediate_grad_update"] = way.ours
        return initialize(**arguments)

    try:
        deepspeed.initialize = with_settings
        if not way.ours:
            gradient_exchange.ShardedSums.take_over = lambda optimizer: None  # type: ignore[method-assign]
        return deepspeed_engine.build_engine(
            deepspeed_engine.Forward(
                model, lambda x, step: LossOutput(model(x).float().square().sum()), "bf16"
            ),
            OptimizerConfig(lr=1e-4, grad_clip=CLIP),
            zero_stage=way.zero_stage,
            precision="bf16",
            accumulation_steps=num_packs,
        )
    finally:
        deepspeed.initialize, gradient_exchange.ShardedSums.take_over = initialize, take_over  # type: ignore[method-assign]


def measure(way: Way, num_packs: int) -> tuple[float, float, int]:
    """Numbers of the second step: bytes sent a parameter, bytes moved in memory beside the passes, waits."""
    engine = build(way, num_packs)
    x = torch.ones(1, WIDTH)
    for _ in range(2):
        counter = Counter()
        with counter, counter.collectives():
            for _ in range(num_packs):
                engine.backward(engine(x, 0)[0][""], scale_wrt_gas=False)
                engine.step()
    engine.destroy()
    plain = Counter()
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]).bfloat16()
    with plain, torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = (counter.memory - num_packs * plain.memory) / num_parameters
    return counter.sent / num_parameters, memory, counter.num_waits


def work(rank: int, world: int, port: int, packs: list[int]) -> None:
    """Runs every way in turn on one rank; rank 0 prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    from engine import distributed

    ranks = distributed.start()
    for way in WAYS:
        rows = [measure(way, num_packs) for num_packs in packs]
        if ranks.is_first:
            cells = [f"{sent:6.2f} {memory:6.1f} {waits:3d}" for sent, memory, waits in rows]
            print(f"{world} ranks  {way.name:32s} " + "  |  ".join(cells), flush=True)
    distributed.stop()


def main() -> None:
    """Prints a line for each way and number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 4], help="of a rank in a step")
    arguments = parser.parse_args()
    from engine.distributed import free_port

    heads = "  |  ".join(f"{packs} packs: sent, memory, waits" for packs in arguments.packs)
    print(f"bytes a parameter and step; {heads}", flush=True)
    for world in arguments.ranks:
        port = free_port()
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=work, args=(rank, world, port, arguments.packs)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)


if __name__ == "__main__":
    main()
