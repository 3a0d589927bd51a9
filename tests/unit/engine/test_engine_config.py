"""What the engine's config accepts and means."""

import pytest

from base.config import ConfigError, from_dict
from engine.engine_config import EngineConfig


def engine(ema_decay):
    return from_dict(EngineConfig, {"steps": 1, "optimizer": {"lr": 1e-3}, "ema_decay": ema_decay})


@pytest.mark.parametrize(
    ("asked", "decays"),
    [(0.9999, (0.9999,)), ([0.9999, 0.999], (0.9999, 0.999)), (0, ()), ([], ()), ([0.9], (0.9,))],
)
def test_one_decay_or_several_or_none(asked, decays):
    assert engine(asked).ema_decays == decays


@pytest.mark.parametrize("asked", [1.0, -0.1, [0.9, 0.9], [0.9, 2]])
def test_decays_that_mean_nothing_are_refused(asked):
    with pytest.raises(ConfigError, match="name decays between 0 and 1, each once"):
        engine(asked)


def test_other_values_are_refused_by_name():
    with pytest.raises(ConfigError, match="ema_decay"):
        engine("often")
