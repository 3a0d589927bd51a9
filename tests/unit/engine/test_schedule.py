import math

import pytest
import torch
from torch import nn

from base.config import ConfigError
from engine.engine_config import OptimizerConfig
from engine.schedule import build_optimizer, hidden_matrices, learning_rate, set_learning_rate


def test_warmup_reaches_the_peak_and_cosine_ends_at_final():
    config = OptimizerConfig(lr=2e-4, final_lr=2e-5, schedule="cosine", warmup_steps=10, decay_end_step=110)
    rates = [learning_rate(config, step, 200) for step in range(200)]
    assert rates[0] == pytest.approx(2e-5)
    assert max(rates) == rates[9] == pytest.approx(2e-4)
    middle = 2e-5 + (2e-4 - 2e-5) * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert rates[60] == pytest.approx(middle)
    assert rates[110] == rates[199] == pytest.approx(2e-5)


def test_linear_waits_for_its_start_and_constant_stays():
    linear = OptimizerConfig(lr=1.0, final_lr=0.0, schedule="linear", decay_start_step=40, decay_end_step=80)
    assert [learning_rate(linear, step, 80) for step in (0, 40, 60, 79)] == [
        1.0,
        1.0,
        0.5,
        pytest.approx(0.025),
    ]
    assert learning_rate(OptimizerConfig(lr=1.0), 10**6, 10) == 1.0


def test_weight_decay_is_for_matrices_only():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[1].bias.requires_grad_(False)
    groups = build_optimizer(OptimizerConfig(lr=1.0, weight_decay=0.1), module).param_groups
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(4, 3)]),
        (0.0, [(4,), (4,)]),
    ]
    assert all(isinstance(group["params"][0], torch.nn.Parameter) for group in groups)


class Blocks(nn.Module):
    """Layers between an embedding and a head, as in every model here."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)) for _ in range(2))
        self.words = nn.Embedding(5, 4)
        self.head = nn.Linear(8, 3)


def test_muon_takes_the_matrices_of_layers_only():
    module = Blocks()
    module.layers[1][0].weight.requires_grad_(False)
    assert hidden_matrices(module) == {module.layers[0][0].weight}
    optimizer = build_optimizer(OptimizerConfig(lr=1.0, name="muon", weight_decay=0.1), module)
    shapes = [
        (group["use_muon"], group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        for group in optimizer.param_groups
    ]
    assert shapes == [
        (True, 0.1, [(8, 4)]),
        (False, 0.1, [(4, 3), (5, 4), (3, 8)]),
        (False, 0.0, [(4,), (8,), (8,), (8,), (8,), (8,), (8,), (3,)]),
    ]


def test_muon_and_adamw_follow_one_schedule_from_their_own_peaks():
    config = OptimizerConfig(lr=2e-3, name="muon", muon_lr=0.04, schedule="cosine", warmup_steps=4)
    groups = build_optimizer(config, Blocks()).param_groups
    for step in (0, 3, 50, 99):
        set_learning_rate(groups, config, step, 100)
        rate = learning_rate(config, step, 100)
        assert [group["lr"] for group in groups] == pytest.approx([20 * rate, rate, rate])


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"lr": 1.0, "beta1": 1.0},
        {"lr": 1.0, "name": "muon", "grad_clip": 1.0},
        {"lr": 1.0, "name": "muon", "muon_lr": 0.0},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError):
        OptimizerConfig(**values)
