"""One simulation of the direction against direct integration and against the exact laws.

On ``problems.mixed_noise_circle``, where the trace of the noise varies along Gamma_1 by the factor
2.95, so that norm, clock and direction depend on each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, FixedRatioDiffusion, LimitingDiffusion, problems
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.clock import GrowthIntegrals
from manifold_sde.verification.exact import CircleDiffusion, CircleNormLaw
from tests.solvers.laws import Comparison, against, against_sample, expected, scale_of, values

PROBLEM = problems.mixed_noise_circle()
ANGLE = 0.7
START = PROBLEM.facts.circle.point(torch.tensor(ANGLE, dtype=torch.float64))
PATHS = 1000
#: Shifts that are found with 99 % probability: of the modes of the angle, and of log norm.
FOUND = {"angle": 0.1, "norm": 0.004}

#: All grid points are kept, so that a path is stepped again from the one before the moment.
TIMES = torch.linspace(0.0, 5.0, 11).tolist()
#: Ticks of 2^-40 in which the time of a Brownian path is read: two clocks that differ by rounding
#: can see increments that differ by 1e-6 sigma.
TICKS = 1e-6

#: For each ratio the norm at the start and the last time; the clock is then 3.4 to 4.2.
CASES = {0.0: (0.6, 0.6), 0.1: (0.6, 0.5), 0.5: (0.5, 0.2), 1.0: (0.43, 0.11), 10.0: (0.24, 0.011)}


@functools.cache
def law(ratio: float) -> CircleNormLaw:
    norm, time = CASES[ratio]
    return _diffusion().at(time, ANGLE, ratio=ratio, norm=norm)


@functools.cache
def _diffusion() -> CircleDiffusion:
    return CircleDiffusion.of(PROBLEM)


def simulate(seed: int = 1, n_paths: int = PATHS) -> DirectionSolution:
    found = solve(
        DirectionDiffusion(PROBLEM),
        START,
        TIMES,
        n_paths=n_paths,
        dt=0.5,
        seed=seed,
        antithetic=True,
        compile=False,
    )
    assert isinstance(found, DirectionSolution)
    return found


@functools.cache
def run() -> DirectionSolution:
    return simulate()


@functools.cache
def answer(ratio: float) -> Solution:
    return moment(run(), ratio)


def sample(solution: Solution, ratio: float) -> np.ndarray:
    return values(PROBLEM, solution.ys[-1], scale_of(law(ratio)), pairs=True)


def moment(run: DirectionSolution, ratio: float) -> Solution:
    norm, time = CASES[ratio]
    return run.at(ratio=ratio, times=[time], norm=norm)


def check(comparison: Comparison) -> None:
    assert comparison.resolution[:4].max() <= FOUND["angle"], comparison.resolution
    assert comparison.resolution[4] <= FOUND["norm"]
    assert comparison.agrees, str(comparison)


@pytest.mark.paper("Theorem 3.2")
@pytest.mark.parametrize("ratio", CASES)
def test_the_law_at_every_ratio_against_direct_integration_and_the_exact_one(
    ratio: float,
) -> None:
    """(8) by a scheme in its own time, with the norm in the state; (13) is ratio 1/2."""
    norm, time = CASES[ratio]
    answered = sample(answer(ratio), ratio)
    form = "stratonovich"
    sde = (
        LimitingDiffusion(PROBLEM, form)
        if ratio == 0.5
        else FixedRatioDiffusion(PROBLEM, ratio, form)
    )
    direct = solve(
        sde,
        START * norm,
        [0.0, time],
        n_paths=PATHS,
        method="weak2",
        dt=time / 8,
        seed=2,
        antithetic=True,
        compile=False,
    )
    integrated = sample(direct, ratio)
    assert run().stats["lost_paths"] == direct.stats["lost_paths"] == 0
    check(against(answered, expected(law(ratio))))
    check(against(integrated, expected(law(ratio))))
    assert against_sample(answered, integrated).agrees


# Broken twins: each is a mistake in what turns the direction into the other diffusions.


def _half_growth(integrals: GrowthIntegrals, x: Tensor, trace: Tensor) -> Tensor:
    """dp/du = -V p + 4c."""
    return trace


def _frozen_trace(integrals: GrowthIntegrals, x: Tensor, trace: Tensor) -> Tensor:
    """V as if it were that of the start all along."""
    return torch.full_like(trace, 2.0 * float(PROBLEM.noise_trace(START)))


def _square_clock(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Du = dt / |Y|^2: the elapsed time adds up the square of the norm."""

    def advance(
        integrals: GrowthIntegrals, sums: Tensor, h: Tensor, before: Tensor, after: Tensor
    ) -> Tensor:
        growth = right(integrals, sums, h, before, after)[0]
        halves = torch.stack([0.5 * sums[0], sums[1]])
        elapsed = right(integrals, halves, h, 0.5 * before, 0.5 * after)[1]
        return torch.stack([growth, elapsed])

    return advance


@pytest.mark.parametrize("twin", ["half growth", "frozen trace", "square clock"])
def test_wrong_clocks_are_rejected(monkeypatch: pytest.MonkeyPatch, twin: str) -> None:
    if twin == "square clock":
        monkeypatch.setattr(GrowthIntegrals, "advance", _square_clock(GrowthIntegrals.advance))
    else:
        rate = {"half growth": _half_growth, "frozen trace": _frozen_trace}[twin]
        monkeypatch.setattr(GrowthIntegrals, "rate", rate)
    broken = moment(simulate(n_paths=400), 0.5)
    comparison = against(sample(broken, 0.5), expected(law(0.5)))
    assert np.abs(comparison.scores).max() > 2.0 * comparison.threshold, str(comparison)


@pytest.mark.paper("Theorem 3.2")
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_ratios_are_ratio_zero_with_time_and_norm_changed(
    ratio: float,
) -> None:
    """Path by path: Y_C(t) = Y_0((e^{4Ct} - 1) / 4C) e^{-Ct}; and no other shrinkage."""
    norm, time = CASES[ratio]
    zero = run().at(ratio=0.0, times=[math.expm1(4 * ratio * time) / (4 * ratio)], norm=norm)
    found = answer(ratio)
    shrunk = zero.ys * math.exp(-ratio * time)
    torch.testing.assert_close(found.ys, shrunk, rtol=0.0, atol=TICKS)
    torch.testing.assert_close(found.clock, zero.clock, rtol=1e-8, atol=0.0)
    for wrong in (0.0, 0.5, 2.0):
        states = zero.ys[-1] * math.exp(-wrong * ratio * time)
        twin = values(PROBLEM, states, scale_of(law(ratio)), pairs=True)
        assert not against(twin, expected(law(ratio))).agrees


def test_initial_norms_may_differ_from_path_to_path() -> None:
    """From q_0 = ||Y(0)||^4 the path is at t where that from 1 is at t / q_0, times the norm."""
    norms = torch.linspace(0.7, 0.9, PATHS, dtype=torch.float64)
    found = run().at(ratio=0.0, times=[1.0], norm=norms)
    chosen = (999, 500, 0)
    from_one = run().at(ratio=0.0, times=[1.0 / float(norms[i]) ** 4 for i in chosen])
    for k, i in enumerate(chosen):
        wanted = norms[i] * from_one.ys[k, i]
        torch.testing.assert_close(found.ys[0, i], wanted, rtol=0.0, atol=TICKS)
