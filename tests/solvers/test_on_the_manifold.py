"""States on the manifold at rounding level, and the norm equation along a path."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    Problem,
    problems,
)
from manifold_sde.solvers import DirectionSolution, solve
from manifold_sde.solvers.schemes import SCHEMES

Array = np.ndarray
Pair = tuple[float, float]

ROUNDING = 1e-12
MIXED = problems.mixed_noise_circle()
#: Step of the clock.
H = 0.125
PROBLEMS = {
    "mixed": problems.mixed_noise_circle,
    "varying": problems.varying_circle,
    "linear": problems.normalized_linear,
    "sphere": problems.great_sphere,
}


def distance(problem: Problem, y: Tensor) -> Tensor:
    """Distance of directions (..., D) to Gamma_1, from what is known of it."""
    u = y / y.norm(dim=-1, keepdim=True)
    if problem.facts.circle is None:
        return u[..., -1].abs()
    circle = problem.facts.circle
    return (u - circle.point(circle.angle(u))).norm(dim=-1)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["split", *sorted(SCHEMES)])
def test_every_saved_state_is_on_the_manifold(name: str, method: str) -> None:
    """Gradient and distance of (13) and of the direction, relative to the norm.

    Where the gradient is known to rounding, the distance is so up to the condition number of H,
    which is 147 for the Gaussian design of section 6.1, and 1 for the others.
    """
    problem = PROBLEMS[name]()
    calculus = (SCHEMES[method].calculus if method != "split" else None) or "ito"
    curvature = torch.linalg.eigvalsh(problem.hessian(problem.minimizer))
    size, condition = float(curvature[-1]), float(curvature[-1] / curvature[-problem.rank])
    step = 0.02 / float(problem.noise_trace(problem.minimizer))
    norm = 0.9
    for sde, dt, start in (
        (LimitingDiffusion(problem, calculus), step * norm**4, norm * problem.minimizer),
        (DirectionDiffusion(problem, calculus), step, problem.minimizer),
    ):
        if method == "walk" and isinstance(sde, LimitingDiffusion):
            continue  # it steps directions alone
        times = [0.0, dt, 1.7 * dt]
        found = solve(sde, start, times, n_paths=20, method=method, dt=dt, compile=False)
        assert found.stats["lost_paths"] == 0
        moved = (found.directions[1:] - found.directions[0]).norm(dim=-1)
        assert float(moved.mean()) > 0.02
        gradient = problem.gradient(found.directions).norm(dim=-1) / size
        assert float(gradient.max()) <= ROUNDING
        assert float(distance(problem, found.ys).max()) <= ROUNDING * condition


@functools.cache
def run() -> DirectionSolution:
    grid = H * torch.arange(17, dtype=torch.float64)
    sde, start = DirectionDiffusion(MIXED), MIXED.minimizer
    found = solve(sde, start, grid, n_paths=3, dt=H, seed=6, compile=False)
    assert isinstance(found, DirectionSolution)
    return found


@pytest.mark.paper("Equation (8)", "Equation (13)")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 10.0])
def test_the_norm_obeys_its_equation_along_the_path(ratio: float) -> None:
    """With q = |Y|^4: dq/du = 2 V q - 4 C q^2 and dt/du = q by SciPy, with V linear in each step.

    The mean of a diffusion between two known states is the line, up to the order of the step.
    """
    norm, grid = 0.3, run().ts
    trace = MIXED.noise_trace(run().ys)
    assert float(trace.max() / trace.min()) > 1.5
    mean = float(trace.mean())
    zero = math.expm1(2.0 * mean * 1.7) / (2.0 * mean) * norm**4
    time = zero if ratio == 0 else math.log1p(4 * ratio * zero) / (4 * ratio)
    found = run().at(ratio=ratio, times=[time], norm=norm)
    for path, clock in enumerate(found.clock[-1].tolist()):
        before = int((grid < clock).sum())
        knots = np.append(grid[:before], clock)
        course = trace[:, path].numpy()
        levels = np.append(course[:before], np.interp(clock, grid.numpy(), course))
        q, t = integrate(knots, levels, ratio, norm**4)
        assert float(found.norms[-1, path]) == pytest.approx(q**0.25, rel=1e-8)
        assert t == pytest.approx(time, rel=1e-8)
        # The trace as it was at the start of each step is no part of the equation.
        frozen, _ = integrate(knots, np.append(levels[:1], levels[:-1]), ratio, norm**4)
        assert abs(float(found.norms[-1, path]) / frozen**0.25 - 1.0) > 1e-5


def integrate(knots: Array, levels: Array, ratio: float, q: float) -> tuple[float, float]:
    """The equation from knot to knot, so that the integrator sees no kinks: q and t at the end."""
    state = np.array([q, 0.0])
    for ends, values in zip(itertools.pairwise(knots), itertools.pairwise(levels), strict=True):

        def slope(u: float, state: Array, ends: Pair = ends, values: Pair = values) -> Array:
            v = np.interp(u, ends, values)
            return np.array([2.0 * v * state[0] - 4.0 * ratio * state[0] ** 2, state[0]])

        state = solve_ivp(slope, ends, state, "DOP853", rtol=1e-12, atol=1e-16).y[:, -1]
    return float(state[0]), float(state[1])
