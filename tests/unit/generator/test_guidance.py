"""Guidance is the published formula, Bagel's renormalisation is Bagel's, and the solvers have their orders."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from base.config import ConfigError, from_dict
from generator.class_conditional.config import ClassFlowConfig, ClassSamplingConfig
from generator.config import FlowConfig
from generator.flow import sampling_times
from generator.guidance import branch_weights, guide
from generator.sampling_config import GuidanceConfig, SamplingConfig
from generator.solvers import integrate, num_evaluations


def velocities(branches: int) -> Tensor:
    """[2 samples, branches, 5 tokens, 3 channels]; those of the second sample are ten times as long."""
    v = torch.randn(2, branches, 5, 3, generator=torch.Generator().manual_seed(branches))
    return v * torch.tensor([1.0, 10.0])[:, None, None, None]


def test_guidance_of_one_is_the_plain_conditional_branch() -> None:
    plain = GuidanceConfig(text_guidance=1.0, source_guidance=1.0)
    for editing in (False, True):
        assert branch_weights(plain, 0.7, editing=editing) == {"full": 1.0}


def test_text_guidance_is_ho_and_salimans() -> None:
    weights = branch_weights(GuidanceConfig(text_guidance=4.0), 0.7, editing=False)
    assert list(weights) == ["none", "full"]
    v = velocities(2)
    none, full = v.unbind(1)
    torch.testing.assert_close(guide(v, weights, GuidanceConfig()), none + 4 * (full - none))


def test_edit_guidance_is_brooks() -> None:
    weights = branch_weights(GuidanceConfig(text_guidance=4.0, source_guidance=1.5), 0.7, editing=True)
    assert list(weights) == ["none", "source", "full"]
    v = velocities(3)
    none, source, full = v.unbind(1)
    expected = none + 1.5 * (source - none) + 4 * (full - source)
    torch.testing.assert_close(guide(v, weights, GuidanceConfig()), expected)


def test_branches_of_no_weight_are_left_out() -> None:
    equal = GuidanceConfig(text_guidance=2.0, source_guidance=2.0)
    assert list(branch_weights(equal, 0.7, editing=True)) == ["none", "full"]
    no_text = GuidanceConfig(text_guidance=0.0)
    assert list(branch_weights(no_text, 0.7, editing=False)) == ["none"]
    measured = GuidanceConfig(text_guidance=0.0, renorm="global")
    assert branch_weights(measured, 0.7, editing=False) == {"none": 1.0, "full": 0.0}


def test_the_interval_leaves_out_its_lower_end_and_holds_its_upper_one() -> None:
    config = GuidanceConfig(guidance_interval=(0.4, 0.8))
    guided = {t: len(branch_weights(config, t, editing=False)) == 2 for t in (0.3, 0.4, 0.41, 0.8, 0.81, 1.0)}
    assert guided == {0.3: False, 0.4: False, 0.41: True, 0.8: True, 0.81: False, 1.0: False}


def test_the_first_step_is_guided_under_any_time_shift() -> None:
    starts = [sampling_times(1, shift / 10)[0] for shift in range(1, 100)]
    assert max(starts) > 1  # the shift rounds
    assert all(len(branch_weights(GuidanceConfig(), t, editing=False)) == 2 for t in starts)


@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
def test_renormalisation_is_that_of_bagel_for_one_image(renorm_min) -> None:
    """The formula of _forward_flow for cfg_renorm_type "global" and "channel", image by image."""
    v, weights = velocities(2), {"none": -3.0, "full": 4.0}
    for renorm, axis in (("global", None), ("channel", -1)):
        config = GuidanceConfig(renorm=renorm, renorm_min=renorm_min)
        for image, found in enumerate(guide(v, weights, config)):
            none, full = v[image]
            guided = none + 4 * (full - none)
            norms = [
                part.norm() if axis is None else part.norm(dim=-1, keepdim=True) for part in (full, guided)
            ]
            factor = (norms[0] / (norms[1] + 1e-8)).clamp(min=renorm_min, max=1.0)
            assert factor.min() < 0.9  # it does something
            torch.testing.assert_close(found, guided * factor)


def test_renormalisation_never_lengthens_and_leaves_the_conditional_branch_alone() -> None:
    shrinking, weights = velocities(2), {"none": 0.7, "full": 0.3}
    shrinking[:, 0] = -shrinking[:, 1]  # guided is 0.4 as long as conditional
    plain = guide(shrinking, weights, GuidanceConfig())
    assert torch.equal(guide(shrinking, weights, GuidanceConfig(renorm="global")), plain)
    alone = velocities(1)
    assert torch.equal(guide(alone, {"full": 1.0}, GuidanceConfig(renorm="channel")), alone[:, 0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guidance_interval": [0.5, 0.5]}, "guidance_interval"),
        ({"guidance_interval": [0.5, 1.5]}, "guidance_interval"),
        ({"guidance_interval": [0.5]}, "guidance_interval"),
        ({"renorm": "text"}, "renorm"),
        ({"renorm_min": 2}, "renorm_min"),
        ({"solver": "rk4"}, "solver"),
        ({"num_steps": 0}, "num_steps"),
        ({"text_guidance": math.nan}, "text_guidance is nan"),
        ({"time_shift": 0}, "time_shift is 0"),
        ({"time_shift": math.nan}, "time_shift is nan"),
    ],
)
def test_bad_settings_are_one_line(settings, words) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        from_dict(SamplingConfig, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [FlowConfig, ClassFlowConfig])
@pytest.mark.parametrize("shift", [-1.0, math.inf])
def test_a_training_needs_a_time_shift_above_0(config: type, shift: float) -> None:
    with pytest.raises(ConfigError, match=f"time_shift is {shift}; give"):
        config(time_shift=shift)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_guidance_of_a_class_is_a_number_too(scale: float) -> None:
    with pytest.raises(ConfigError, match=f"guidance is {scale}; give a number") as error:
        from_dict(ClassSamplingConfig, {"guidance": scale})
    assert "\n" not in str(error.value)


def decay(x: Tensor, t: float) -> Tensor:
    """d x / dt = (1 + t) x, which grows by exp(1.5) from t = 0 to t = 1."""
    return (1 + t) * x


def error_of(solver: str, num_steps: int) -> float:
    """At t = 0; before the last step, which Heun leaves to Euler, there is its own order only."""
    start = torch.ones(1, dtype=torch.float64)
    times = [0.1 + 0.9 * t for t in sampling_times(num_steps, 2.0)]  # ends at 0.1, not 0
    exact = math.exp((0.1 + 0.1**2 / 2) - 1.5)
    return abs(integrate(decay, start, times, solver).item() - exact)


def test_euler_is_of_first_and_heun_of_second_order() -> None:
    assert error_of("euler", 32) / error_of("euler", 64) == pytest.approx(2, rel=0.1)
    assert error_of("heun", 32) / error_of("heun", 64) == pytest.approx(4, rel=0.1)
    assert error_of("heun", 32) < error_of("euler", 64) / 10


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_count_of_evaluations_is_what_is_said_and_none_is_at_zero(solver, num_steps) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    integrate(velocity, torch.ones(1), sampling_times(num_steps, 2.0), solver)
    assert len(asked) == num_evaluations(num_steps, solver) and min(asked) > 0


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_straight_path_is_followed_exactly_in_any_number_of_steps(solver) -> None:
    noise, data = torch.tensor([1.0]), torch.tensor([-2.0])
    for num_steps in (1, 3):
        found = integrate(lambda x, t: noise - data, noise, sampling_times(num_steps, 3.0), solver)
        torch.testing.assert_close(found, data)
