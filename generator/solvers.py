"""Solvers of d x_t / dt = v(x_t, t) from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from generator.sampling_config import Solver

Velocity = Callable[[Tensor, float], Tensor]
"""(x_t, t) -> v, of the shape of x_t."""


def integrate(velocity: Velocity, x: Tensor, times: Sequence[float], solver: Solver) -> Tensor:
    """Integrates from `x` at the first of the falling `times`; returns x at the last one.

    Euler: one evaluation a step, error of first order. Heun: the mean of the velocities at both ends of a step, error
    of second order (Karras et al. 2022, algorithm 1). A step that ends at 0 is Euler's, as no image was trained at time
    0.
    """
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        if solver == "heun" and t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def num_evaluations(num_steps: int, solver: Solver) -> int:
    """Velocities that `integrate` evaluates on the way to 0: num_steps with Euler, 2 num_steps - 1 with Heun."""
    return num_steps if solver == "euler" else 2 * num_steps - 1
