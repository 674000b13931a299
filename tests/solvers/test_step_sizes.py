"""How small the steps of SGD are, beside a prediction: against SGD itself and by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from manifold_sde import DirectionDiffusion, Problem, SphericalNoise, TimeScale, problems
from manifold_sde.errors import StepSizeWarning
from manifold_sde.solvers import DirectionSolution, predict_sgd, run_sgd, solve
from manifold_sde.solvers.step_sizes import StepSizes, Terrain


def direction(scale: float, clock: float = 0.5) -> DirectionSolution:
    problem = problems.great_circle(noise_scale=scale)
    times = [0.0, clock]
    found = solve(DirectionDiffusion(problem), problem.minimizer, times, n_paths=4, dt=clock / 4)
    assert isinstance(found, DirectionSolution)
    return found


def terrain(scale: float = 0.3) -> Terrain:
    problem = problems.great_circle(noise_scale=scale)
    return Terrain.of(DirectionDiffusion(problem), problem.minimizer[None])


def test_terrain_of_the_great_circle() -> None:
    """H = e_3 e_3^T and Sigma = s^2 (I - y y^T) at norm 1."""
    assert terrain().sharpness == pytest.approx(1.0)
    assert terrain().trace == pytest.approx(2 * 0.3**2)
    assert terrain().spread == pytest.approx(0.3**2 / 2)
    problem = problems.great_circle()
    doubled = Terrain.of(DirectionDiffusion(problem), problem.minimizer[None], 2.0)
    assert doubled.trace == pytest.approx(2 * terrain().trace)
    assert doubled.spread == pytest.approx(2 * terrain().spread)


def test_steps_of_constant_rates_are_those_of_the_closed_norm() -> None:
    """The trace is constant: |x|^4 follows (10), and eps = eta / |x|^2 up to O(eta lambda)."""
    scale, norm = TimeScale(1e-3, 0.05), 1.3
    found = StepSizes.of(scale, 20_000, norm, terrain())
    wanted = 1e-3 / float(scale.norm(20_000, norm, terrain().trace)) ** 2
    assert found.last == pytest.approx(wanted, rel=1e-3)
    assert found.largest == found.last  # the norm falls all the way
    assert found.equilibrium == pytest.approx(math.sqrt(2 * 1e-3 * 0.05 / terrain().trace))
    grown = StepSizes.of(scale, 200, 1e-3, terrain())
    assert grown.largest == pytest.approx(1e-3 / 1e-6 / (1 - 5e-5))


def test_steps_of_a_schedule_are_those_of_sgd() -> None:
    """SGD read off step by step: the largest step is where the learning rate has its peak."""
    problem = problems.great_circle(noise_scale=0.3)
    lr = np.concatenate([np.linspace(0.001, 0.03, 150), np.full(150, 0.003)])
    scale = TimeScale(lr, 0.2)
    found = StepSizes.of(scale, 300, 1.0, terrain())
    run = run_sgd(
        problem, problem.minimizer, lr.tolist(), 0.2, list(range(301)), n_paths=50, seed=3
    )
    steps = torch.from_numpy(lr / (1 - 0.2 * lr)) / run.norms[:-1].square().mean(1)
    assert found.largest == pytest.approx(float(steps.max()), rel=0.02)
    assert found.last == pytest.approx(float(steps[-1]), rel=0.02)
    assert found.equilibrium is None
    assert found.largest > 5 * found.last


def test_distance_from_the_manifold_is_that_of_sgd() -> None:
    """In equilibrium; the first-order formula is right to O(eps)."""
    problem = problems.great_circle(noise_scale=0.3)
    scale, steps = TimeScale(0.01, 0.0125), 300
    norm = float(scale.equilibrium_norm(terrain().trace))
    found = StepSizes.of(scale, steps, norm, terrain())
    run = run_sgd(problem, norm * problem.minimizer, 0.01, 0.0125, [steps], n_paths=2000, seed=4)
    measured = float(run.directions[0, :, 2].square().mean().sqrt())
    # A standard deviation from 2000 normal values: 1.6 per cent; 4 of them and the O(eps).
    assert found.off_manifold == pytest.approx(measured, rel=0.07 + found.largest)


def test_a_prediction_says_how_small_its_steps_are() -> None:
    stats = direction(0.3).at_steps(0.01, 0.05, [50, 100], norm=1.0).stats
    wanted = StepSizes.of(TimeScale(0.01, 0.05), 100, 1.0, terrain())
    for name, value in wanted.stats().items():
        assert stats[name] == pytest.approx(value, rel=1e-9)
    batch = direction(0.3).at_steps(0.01, 0.05, [100], norm=1.0, batch_size=4).stats
    assert batch["off_manifold"] < 0.52 * stats["off_manifold"]


def test_a_prediction_for_unstable_sgd_warns_and_sgd_does_leave() -> None:
    """Beyond 2 / lambda_max the step across the manifold grows instead of shrinking."""
    lr, norm, steps, scale = 0.25, 0.3, 4, 0.005
    run = direction(scale, 40.0)
    with pytest.warns(StepSizeWarning, match="SGD is unstable") as caught:
        found = run.at_steps(lr, 0.01, [steps], norm=norm)
    assert found.stats["stability"] > 2.0
    assert [w.filename for w in caught if w.category is StepSizeWarning] == [__file__]
    problem = problems.great_circle(noise_scale=scale)
    sgd = run_sgd(problem, norm * problem.minimizer, lr, 0.01, [1, steps], n_paths=200)
    across = sgd.directions[..., 2].abs().mean(1)
    assert float(across[1]) > 3.0 * float(across[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.at_steps(lr / 10, 0.01, [steps], norm=norm)


def test_a_run_that_is_too_short_to_go_far_is_not_far() -> None:
    """Directions of small curvature would take SGD far from the manifold, in thousands of steps."""
    sizes = torch.cat([torch.zeros(5), torch.logspace(-3, 1, 15)]).double()
    problem = Problem(lambda x: (x * x * sizes.to(x)).sum() / (x @ x) / 2, 20, SphericalNoise(0.15))
    start = (sizes == 0).double() / 5**0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predict_sgd(problem, start, 0.02, 0.05, [0, 20, 50], n_paths=10)
    run = run_sgd(problem, start, 0.02, 0.05, [50], n_paths=1000)
    off = run.directions[0][:, 5:].square().sum(1).mean().sqrt()
    assert found.stats["off_manifold"] == pytest.approx(float(off), rel=0.3)
    with pytest.warns(StepSizeWarning, match="away"):
        predict_sgd(problem, start, 0.02, 0.05, [0, 20000], n_paths=10)
