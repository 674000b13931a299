"""One simulation of the direction answers for every ratio, norm and schedule."""

from __future__ import annotations

import math

import pytest
import torch

from manifold_sde import DirectionDiffusion, LimitingDiffusion, Problem, problems
from manifold_sde.errors import ArgumentError, ClockRangeError
from manifold_sde.solvers import DirectionSolution, fixed, solve

STEP = 1.0 / 8.0


def direction(problem: Problem, n: int, times: list[float], seed: int = 0) -> DirectionSolution:
    sde = DirectionDiffusion(problem)
    found = solve(sde, problem.minimizer, times, n_paths=n, dt=STEP, seed=seed)
    assert isinstance(found, DirectionSolution)
    return found


@pytest.mark.paper("Theorem 3.2")
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_norm_and_clock_follow_their_equation(ratio: float) -> None:
    """Constant trace: everything but the direction is in closed form."""
    problem = problems.great_circle(noise_scale=0.3)
    trace, norm = 2 * 0.3**2, 1.3
    run = direction(problem, 3, [0.0, 1.0, 8.0])
    times = [0.0, 0.2, 0.45]
    found = run.at(ratio=ratio, times=times, norm=norm)
    for k, t in enumerate(times):
        zero = t if ratio == 0 else math.expm1(4 * ratio * t) / (4 * ratio)
        clock = math.log1p(2 * trace * zero / norm**4) / (2 * trace)
        fourth = (norm**4 + 2 * trace * zero) * math.exp(-4 * ratio * t)
        if clock > 8.0:
            pytest.fail("choose shorter times")
        wanted = torch.full((3,), fourth**0.25, dtype=torch.float64)
        torch.testing.assert_close(found.norms[k], wanted, rtol=1e-12, atol=0.0)
        wanted = torch.full((3,), clock, dtype=torch.float64)
        torch.testing.assert_close(found.clock[k], wanted, rtol=1e-12, atol=1e-14)


def test_times_asked_for_do_not_change_the_paths() -> None:
    problem = problems.mixed_noise_circle()
    few = direction(problem, 4, [0.0, 1.5])
    many = direction(problem, 4, [0.0, 0.7, 1.234, 1.5])
    torch.testing.assert_close(few.ys[-1], many.ys[-1], rtol=0.0, atol=1e-13)
    torch.testing.assert_close(few.growth[-1], many.growth[-1], rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("block", [2, 64])
def test_split_takes_the_steps_that_it_needs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends within a few steps of the clock of the last path, also in many blocks."""
    monkeypatch.setattr(fixed, "_BLOCK_STEPS", block)
    problem = problems.mixed_noise_circle()
    times = [0.0, 0.2, 1.0]
    run = solve(LimitingDiffusion(problem), problem.minimizer, times, n_paths=3, dt=0.4)
    needed = float(run.clock[-1].max()) / run.config["dt"]
    assert needed <= run.stats["steps"] <= needed + 3.0
    assert run.stats["lost_paths"] == 0
    assert bool(torch.isfinite(run.ys).all())


def test_states_are_on_the_manifold() -> None:
    problem = problems.mixed_noise_circle()
    run = direction(problem, 20, [0.0, 1.234, 2.5])
    assert float(problem.gradient(run.ys).norm(dim=-1).max()) < 1e-12
    torch.testing.assert_close(run.norms, torch.ones_like(run.norms), rtol=0.0, atol=1e-14)
    assert run.stats["lost_paths"] == 0


def test_moments_beyond_the_run_are_refused_with_the_clock_that_is_needed() -> None:
    problem = problems.great_circle(noise_scale=0.3)
    run = direction(problem, 2, [0.0, 1.0])
    with pytest.raises(ClockRangeError, match="about u = ") as caught:
        run.at(ratio=0.5, times=[3.0])
    trace = 2 * 0.3**2
    needed = math.log1p(2 * trace * math.expm1(6.0) / 2) / (2 * trace)
    assert f"{1.1 * needed:.4g}" in str(caught.value)
    # At T = 1000 the clock is linear in T, although no double holds exp(2 T).
    needed = (2000.0 + math.log(trace)) / (2 * trace)
    with pytest.raises(ClockRangeError, match=f"about u = {1.1 * needed:.4g}"):
        run.at(ratio=0.5, times=[1000.0])
    for arguments in ({"ratio": -1.0}, {"norm": 0.0}, {"times": [1.0, 0.5]}):
        with pytest.raises(ArgumentError):
            run.at(**{"ratio": 0.5, "times": [0.1], **arguments})
    with pytest.raises(ArgumentError, match="not step counts"):
        run.at_steps(0.01, 0.05, [10.5])
    with pytest.raises(ArgumentError, match="batch_size"):
        run.at_steps(0.01, 0.05, [10], batch_size=0)
