"""Adaptive steps: tolerance, independence of the batch, limits, and a Brownian path left whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    WeightDecaySDE,
    problems,
)
from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError, LostPathsWarning
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.adaptive import AdaptiveSteps, StepControl
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.clock import ClockIntegral
from manifold_sde.solvers.fixed import Grid, SavedValues, SaveTimes
from manifold_sde.solvers.schemes import Scheme, StepNoise
from manifold_sde.verification.exact import CircleDiffusion

#: A first step whose cell is that of steps of one size: the Brownian paths are then the same.
STEP = 1.0 / 32.0


# A Brownian path left whole.


class _Sum(Scheme):
    """Adds up the increments; its error is that of a rough function of them."""

    name = "sum"
    calculus = "stratonovich"
    weak_order = 1
    strong_order_commutative = 1.0
    cost = "nothing"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """The first components add up; the last one makes errors of the square of the step."""
        moved = x[:-1] + noise.dw
        bend = x[-1:] + (3.0 * noise.dw[:1]).sin() * (2.0 * x[:1]).cos()
        return torch.cat([moved, bend]), basis


class _Still:
    """Nothing that a sum would need."""

    def reference_basis(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], 0, x.shape[1])

    def noise_trace(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[0])


def summed(paths: int, tolerance: float, redraw: bool = False) -> tuple[Tensor, Tensor, int]:
    """Sums of the increments taken up to time 3, W there, and the number of steps refused."""

    class Redrawn(BrownianPath):
        """The broken twin: what is tried again gets numbers of its own."""

        tries = 0

        def dyadic(self, level: Any, position: Tensor, **options: Any) -> Tensor:
            self.tries += 1
            other = BrownianPath(1000 + self.tries, 2, self.paths, cell=1.0)
            return other.dyadic(level, position, **options)

    kind = Redrawn if redraw else BrownianPath
    steps = AdaptiveSteps(
        _Still(),
        Grid(0.0, 0.25, 2, 1.0),
        ClockIntegral(),
        lambda indices: kind(7, 2, indices, cell=1.0),
        torch.arange(paths),
        SaveTimes((3.0,)),
        StepControl(0.0, tolerance, 1.0, 25),
    )
    state = steps.begin(torch.zeros(3, paths, dtype=torch.float64))
    ends = torch.zeros(2, paths, dtype=torch.float64)

    def save(_: int, places: Tensor, values: SavedValues) -> None:
        ends[:, places] = values.x[:2]

    while not steps.finished(state):
        for step in steps.block(state, save):
            basis = steps.sde.reference_basis(step.x) if step.basis is None else step.basis
            end = _Sum().step(steps.sde, step.x, basis, step.h, step.noise)
            step.end, step.end_basis = end
            step.rate = steps.rate(step.end)
    truth = BrownianPath(7, 2, paths, cell=1.0)(0.0, 3.0).T
    return ends, truth, int(state.rejected.sum())


def test_what_was_refused_is_refined_and_never_skipped() -> None:
    ends, truth, rejected = summed(200, 0.05)
    assert rejected > 1000
    torch.testing.assert_close(ends, truth, rtol=0.0, atol=1e-11)


def test_numbers_drawn_anew_after_a_refusal_are_noticed() -> None:
    ends, truth, _ = summed(200, 0.05, redraw=True)
    # They also shrink the variance, which is 3: large increments are refused more often.
    assert float((ends - truth).abs().max()) > 0.1
    assert float(ends[0].var()) < 0.8 * 3.0


# Tolerance.


#: The problems whose laws are known exactly, with the last clock.
EXACT = {
    "varying": (lambda: problems.varying_circle(noise_scale=0.6), 2.0),
    "great circle": (lambda: problems.great_circle(noise_scale=0.6), 2.0),
    "sphere": (lambda: problems.great_sphere(noise_scale=0.6), 2.0),
    "linear": (lambda: problems.normalized_linear(design="orthogonal", noise_scale=0.6), 2.0),
    "mixed": (problems.mixed_noise_circle, 8.0),
}


@pytest.mark.parametrize(
    "name",
    [
        "varying",
        pytest.param("great circle", marks=pytest.mark.thorough),
        pytest.param("sphere", marks=pytest.mark.thorough),
        pytest.param("linear", marks=pytest.mark.thorough),
        pytest.param("mixed", marks=pytest.mark.thorough),
    ],
)
def test_the_error_of_a_path_falls_with_the_tolerance(name: str) -> None:
    """Against the other scheme at small steps of one size, on the same Brownian paths."""
    make, end = EXACT[name]
    problem = make()
    sde = DirectionDiffusion(problem, "stratonovich")
    arguments = {"n_paths": 60, "seed": 3}
    times = [0.0, end / 2, end]
    fine = solve(sde, problem.minimizer, times, method="midpoint", dt=1 / 64, **arguments)
    errors = []
    for rtol in (3e-1, 3e-2, 3e-3):
        found = solve(
            sde,
            problem.minimizer,
            times,
            method="heun",
            dt=STEP,
            rtol=rtol,
            adaptive=True,
            **arguments,
        )
        errors.append(float((found.ys - fine.ys).norm(dim=-1).square().mean().sqrt()))
        assert float(problem.gradient(found.ys).norm(dim=-1).max()) < 1e-12
    # Expected of a tolerance t is t^(2/3), .22 for each; the first is held by the largest step.
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_the_law_is_approached_as_the_tolerance_falls() -> None:
    """Bias of E cos(angle), paired with small steps of one size, whose law is known."""
    problem = problems.varying_circle()
    law = CircleDiffusion.reversible(problem)
    sde = DirectionDiffusion(problem, "stratonovich")
    arguments = {"n_paths": 1000, "seed": 5}
    fine = solve(sde, problem.minimizer, [0.0, 6.0], method="heun", dt=1 / 16, **arguments)
    biases = []
    for rtol in (2e-1, 2e-2):
        coarse = solve(
            sde, problem.minimizer, [0.0, 6.0], dt=0.5, rtol=rtol, adaptive=True, **arguments
        )
        apart = coarse.ys[-1, :, 0] - fine.ys[-1, :, 0]
        biases.append((float(apart.mean()), float(apart.std()) / 1000**0.5))
    assert abs(biases[1][0]) < 4.0 * biases[1][1] + 2e-3
    assert abs(biases[1][0]) < max(abs(biases[0][0]), 5e-3)
    mean, error = fine.expectation(lambda y: y[:, 0])
    exact = float(law.expectation(np.cos, 6.0))
    # False alarm 6e-5; an error of 0.08 is found with 99 %.
    assert abs(float(mean[-1]) - exact) < 4.0 * float(error[-1]) + 2e-3


def test_a_path_does_not_depend_on_the_others() -> None:
    problem = problems.varying_circle()
    sde = DirectionDiffusion(problem)
    times = [0.0, 1.3, 2.0]
    many = solve(sde, problem.minimizer, times, n_paths=40, rtol=5e-2)
    few = solve(sde, problem.minimizer, times, n_paths=2, rtol=5e-2)
    torch.testing.assert_close(many.ys[:, :2], few.ys, rtol=0.0, atol=1e-13)
    small = solve(sde, problem.minimizer, times, n_paths=40, rtol=5e-2, chunk_size=21)
    torch.testing.assert_close(many.ys, small.ys, rtol=0.0, atol=1e-13)


# One simulation answers for all, with adaptive steps too.


def test_at_takes_the_same_steps_again(tmp_path: Path) -> None:
    problem = problems.mixed_noise_circle()
    run = solve(
        DirectionDiffusion(problem), problem.minimizer, [0.0, 0.4, 1.0], n_paths=3, rtol=0.1
    )
    assert isinstance(run, DirectionSolution)
    found = run.at(ratio=0.5, times=[0.2, 0.5])
    limiting = LimitingDiffusion(problem)
    direct = solve(limiting, problem.minimizer, [0.0, 0.2, 0.5], n_paths=3, rtol=0.1)
    torch.testing.assert_close(found.ys, direct.ys[1:], rtol=0.0, atol=1e-12)
    run.save(tmp_path / "run.npz")
    again = DirectionSolution.load(tmp_path / "run.npz", sde=DirectionDiffusion(problem))
    assert torch.equal(again.at(ratio=0.5, times=[0.2, 0.5]).ys, found.ys)


def test_a_checkpoint_holds_the_steps_of_each_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problems.varying_circle()
    arguments: dict[str, Any] = {"n_paths": 6, "rtol": 5e-2, "chunk_size": 4}
    sde = DirectionDiffusion(problem)
    whole = solve(sde, problem.minimizer, [0.0, 1.0, 3.0], **arguments)
    monkeypatch.setattr("manifold_sde.solvers.stopping._CHECKPOINT_SECONDS", 0.0)
    real, calls = AdaptiveSteps.block, []

    def stopping(self: AdaptiveSteps, *given: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(AdaptiveSteps, "block", stopping)
    with pytest.raises(KeyboardInterrupt):
        solve(sde, problem.minimizer, [0.0, 1.0, 3.0], checkpoint=tmp_path, **arguments)
    again = solve(sde, problem.minimizer, [0.0, 1.0, 3.0], checkpoint=tmp_path, **arguments)
    assert torch.equal(again.ys, whole.ys)
    assert again.stats == whole.stats


# Limits, and what is refused.


def test_steps_stay_within_their_limits() -> None:
    problem = problems.varying_circle()
    sde = DirectionDiffusion(problem)
    run = solve(sde, problem.minimizer, [0.0, 4.0], n_paths=3, rtol=0.5, dt_max=1 / 16)
    assert run.stats["steps"] >= 3 * 64
    assert run.config["smallest_dt"] < 1e-6


def test_a_path_that_needs_smaller_steps_is_lost_and_not_accepted() -> None:
    problem = problems.mixed_noise_circle()
    sde = LimitingDiffusion(problem, "stratonovich")
    arguments: dict[str, Any] = {"n_paths": 4, "method": "heun", "dt_min": 0.01, "rtol": 1e-9}
    with pytest.warns(LostPathsWarning, match="4 of 4 paths were lost"):
        run = solve(sde, problem.minimizer, [0.0, 0.5], **arguments)
    assert run.stats["lost_paths"] == 4
    assert bool(torch.isnan(run.ys[-1]).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "euler", "rtol": 1e-2}, "converges to another process"),
        ({"method": "phi_jet", "rtol": 1e-2}, "converges to another process"),
        ({"method": "weak2", "rtol": 1e-2}, "beside the Brownian path"),
        ({"dt": 0.1, "rtol": 1e-2}, "adaptive=True makes dt the first step"),
        ({"adaptive": False, "rtol": 1e-2}, "have no tolerance"),
        ({"dt_min": 1e-2}, "have no tolerance"),
        ({"rtol": -1.0}, "rtol is not a positive number"),
        ({"rtol": 1e-2, "dt_min": 1.0, "dt_max": 0.1}, "dt_min is larger than dt_max"),
        ({"rtol": 1e-2, "dt_min": 1.0}, "smallest step is larger"),
        ({"adaptive": "yes"}, "adaptive must be True, False or None"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    problem = problems.varying_circle()
    calculus = "stratonovich" if arguments.get("method") == "weak2" else "ito"
    with pytest.raises(ArgumentError, match=message):
        solve(LimitingDiffusion(problem, calculus), problem.minimizer, [0.0, 0.1], **arguments)


def test_the_sde_in_the_whole_space_is_adaptive_in_stratonovich_form() -> None:
    problem = problems.varying_circle()
    sde = WeightDecaySDE(problem, lr=0.05, weight_decay=0.05)
    found = solve(sde, problem.minimizer, [0.0, 10.0], n_paths=5, rtol=1e-3)
    assert found.config["method"] == "heun"
    with warnings.catch_warnings():
        fine = solve(
            sde.with_calculus("stratonovich"),
            problem.minimizer,
            [0.0, 10.0],
            n_paths=5,
            dt=1 / 16,
            method="heun",
        )
    assert isinstance(fine, Solution)
    assert float((found.ys.norm(dim=-1) - fine.ys.norm(dim=-1)).abs().max()) < 0.05
