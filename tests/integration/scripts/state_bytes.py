"""What DeepSpeed allocates for a model with next to no activations, in steps of one pack and of two, as JSON lines."""

import json
import sys

import torch
from torch import nn

from base.objective import LossOutput
from engine import deepspeed_engine, distributed
from engine.engine_config import EngineConfig, OptimizerConfig
from engine.memory import StateBytes, TensorBytes

WIDTH, LAYERS = 512, 40


def measure(config: EngineConfig, num_packs: int, num_ranks: int) -> tuple[float, float]:
    """Bytes at the most: expected and found."""
    counted = TensorBytes()
    with counted:
        model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        count = sum(p.numel() for p in model.parameters())

        def loss(batch: torch.Tensor, _step: int) -> LossOutput:
            return LossOutput(model(batch).float().square().sum())

        engine = deepspeed_engine.build_engine(
            deepspeed_engine.Forward(model, loss, config.precision),
            config.optimizer,
            zero_stage=config.zero_stage,
            precision=config.precision,
            accumulation_steps=num_packs,
        )
        for _ in range(2):
            counted.reset_peak()
            for _ in range(num_packs):
                engine.backward(engine(torch.ones(1, WIDTH), 0)[0][""], scale_wrt_gas=False)
                engine.step()
    expected = StateBytes.of(config, count, 0, num_ranks, accumulates=num_packs > 1)
    return expected.peak(0), counted.peak


def main() -> None:
    ranks = distributed.start()
    for precision in ("fp32", "bf16"):
        for stage in (1, 2, 3):
            for num_packs in (1, 2):
                config = EngineConfig(1, OptimizerConfig(1e-4), None, precision, stage, ema_decay=0.0)
                numbers = measure(config, num_packs, ranks.world)
                if ranks.is_first:
                    print(json.dumps([precision, stage, num_packs, *numbers]), flush=True)
    distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
