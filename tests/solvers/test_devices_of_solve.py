"""Blocks of steps on a device without data: nothing is left behind, nothing waits for a number.

The meta device refuses to meet a tensor of another device, and to turn one into a number: a step
that would wait for the device raises there.
"""

from __future__ import annotations

import pytest
import torch

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    WeightDecaySDE,
    problems,
)
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.solvers import solve
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.clock import ClockIntegral, GrowthIntegrals, RunningIntegrals
from manifold_sde.solvers.fixed import FixedSteps, Grid, SaveTimes, State
from manifold_sde.solvers.schemes import SCHEMES


def general() -> Problem:
    """Section 6.1 as a plain problem, which takes the route of Hessians."""
    linear = problems.normalized_linear()
    return Problem(
        lambda x: 0.5 * linear.pointwise.residuals(x).square().mean(),
        10,
        SphericalNoise(0.3),
        rank=8,
    )


PROBLEMS = {
    "interpolation": problems.normalized_linear,
    "general": general,
    "sampling": problems.mixed_noise_circle,
}


def steps_of(
    sde: StochasticEquation, integrals: RunningIntegrals, dtype: torch.dtype
) -> FixedSteps:
    def brownian(paths: torch.Tensor) -> BrownianPath:
        return BrownianPath(3, sde.n_noise, paths, dtype=dtype, device="meta")

    paths = torch.arange(5, device="meta")
    grid, saved = Grid(0.0, 0.25, 2, 1.0), SaveTimes((0.0, 0.5))
    return FixedSteps(sde, grid, integrals, brownian, paths, saved)


def take(steps: FixedSteps, method: str, state: State) -> None:
    """Take a block of steps."""
    for step in steps.block(state, lambda *_: None):
        assert step.basis is not None
        end = SCHEMES[method].step(steps.sde, step.x, step.basis, step.h, step.noise)
        step.end, step.end_basis = end
        step.rate = steps.rate(step.end)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "weak2"])
@pytest.mark.parametrize("name", PROBLEMS)
@torch.no_grad()
def test_a_block_of_steps_stays_on_its_device(name: str, method: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]()
    for kind in (DirectionDiffusion, LimitingDiffusion):
        sde = kind(problem, SCHEMES[method].calculus or "ito")
        assert isinstance(sde, ManifoldEquation)
        if problem.facts is not None:
            sde.require_on_manifold(problem.minimizer)
        direct = kind is DirectionDiffusion
        run = steps_of(sde, GrowthIntegrals() if direct else ClockIntegral(), dtype)
        x = torch.empty(problem.dim, 5, dtype=dtype, device="meta")
        state = run.begin(x)
        for _ in range(2):  # the first block is one step
            take(run, method, state)
        for tensor in (state.x, state.basis, state.rate, state.sums):
            assert (tensor.device.type, tensor.dtype) == ("meta", dtype)
        assert state.x.shape == x.shape
        assert state.position == 2


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
@torch.no_grad()
def test_steps_in_the_whole_space_stay_on_their_device(method: str) -> None:
    problem = problems.mixed_noise_circle()
    sde = WeightDecaySDE(problem, 0.05, 0.05, SCHEMES[method].calculus or "ito")
    run = steps_of(sde, ClockIntegral(0.05**2), torch.float64)
    state = run.begin(torch.empty(3, 5, dtype=torch.float64, device="meta"))
    take(run, method, state)
    assert state.x.device.type == "meta"


def test_the_check_finds_a_step_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin looks at a number in every step."""
    problem = problems.mixed_noise_circle()
    sde = WeightDecaySDE(problem, 0.05, 0.05)
    run = steps_of(sde, ClockIntegral(), torch.float64)
    state = run.begin(torch.empty(3, 5, dtype=torch.float64, device="meta"))
    scheme = type(SCHEMES["euler"])
    step = scheme.step

    def waiting(self, sde, x, basis, h, noise):  # type: ignore[no-untyped-def]
        assert bool(torch.isfinite(x).all())
        return step(self, sde, x, basis, h, noise)

    monkeypatch.setattr(scheme, "step", waiting)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take(run, "euler", state)


@pytest.mark.cuda
def test_a_run_on_a_real_device() -> None:
    problem = problems.mixed_noise_circle()
    sde = DirectionDiffusion(problem)
    there = solve(sde, problem.minimizer.cuda(), [0.0, 1.0], n_paths=8, dt=0.25, compile=False)
    here = solve(sde, problem.minimizer, [0.0, 1.0], n_paths=8, dt=0.25, compile=False)
    assert there.ys.device.type == "cuda"
    torch.testing.assert_close(there.ys.cpu(), here.ys, rtol=1e-9, atol=1e-10)
