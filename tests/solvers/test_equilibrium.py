"""Averages under pi, the equilibrium in time, and not under that of the clock."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import DirectionDiffusion, problems
from manifold_sde.errors import NotMixedWarning
from manifold_sde.solvers import DirectionSolution, Solution, run_sgd, solve
from manifold_sde.solvers.equilibrium import EquilibriumAverage, average
from manifold_sde.verification.exact import CircleDiffusion, PeriodicLaw

pytestmark = pytest.mark.slow

PROBLEM = problems.mixed_noise_circle()
LEVEL = 1e-4
#: Standard errors that one of four averages exceeds with probability LEVEL.
THRESHOLD = float(stats.norm.isf(LEVEL / 8))
#: A shift of E sin 2 angle that is found with 99 % probability; pi and pi_u differ by 0.12.
FOUND = 0.09


def modes(y: Tensor) -> Tensor:
    """The first two Fourier modes of the angle, (n, 4)."""
    angle = PROBLEM.facts.circle.angle(y)
    waves = [angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()]
    return torch.stack(waves, -1)


def expected(law: PeriodicLaw) -> np.ndarray:
    moments = (law.moment(1), law.moment(2))
    return np.array([part for m in moments for part in (m.real, m.imag)])


@pytest.fixture(scope="module")
def law() -> CircleDiffusion:
    return CircleDiffusion.of(PROBLEM)


@pytest.fixture(scope="module")
def run(law: CircleDiffusion) -> DirectionSolution:
    """From starts that have the equilibrium of the clock, so that only the norms have to settle.

    The norm at the start is forgotten at the rate 2 V, 0.14 on average: half way, where averaging
    begins, to 8 % of what the two equilibria differ by.
    """
    grid = np.linspace(-np.pi, np.pi, 4001)
    uniform = (np.arange(1500) + 0.5) / 1500
    angles = np.interp(uniform, law.equilibrium_in_clock.cdf(grid), grid)
    starts = PROBLEM.facts.circle.point(torch.from_numpy(angles))
    times = torch.linspace(0.0, 36.0, 19)
    found = solve(DirectionDiffusion(PROBLEM), starts, times, dt=0.5, seed=8, compile=False)
    assert isinstance(found, DirectionSolution)
    return found


def scores(found: EquilibriumAverage, law: PeriodicLaw) -> np.ndarray:
    return (found.mean.numpy() - expected(law)) / found.standard_error.numpy()


#: The run is two and a half relaxation times long, and good for its starts alone.
short = pytest.mark.filterwarnings("ignore:the run is too short")


@pytest.mark.paper("Theorem 5.4")
@short
def test_averages_are_those_of_the_equilibrium_in_time(
    run: DirectionSolution, law: CircleDiffusion
) -> None:
    assert run.stats["lost_paths"] == 0
    found = run.equilibrium(modes)
    resolution = (THRESHOLD + stats.norm.isf(0.01)) * found.standard_error.numpy()
    assert resolution[3] < FOUND, resolution
    assert np.abs(scores(found, law.equilibrium)).max() < THRESHOLD


@short
def test_averages_that_are_not_weighted_are_those_of_the_clock(
    run: DirectionSolution, law: CircleDiffusion
) -> None:
    """The broken twin: the states of the clock counted alike. It meets pi_u and misses pi."""
    unweighted = average(run, modes, None, None)
    assert np.abs(scores(unweighted, law.equilibrium_in_clock)).max() < THRESHOLD
    assert np.abs(scores(unweighted, law.equilibrium)).max() > THRESHOLD
    assert float(unweighted.mean[3]) - law.equilibrium.moment(2).imag > 0.08


def test_a_run_that_has_not_mixed_is_told() -> None:
    """SGD near its start: the two halves of what is counted differ."""
    problem = problems.great_circle()
    run = run_sgd(problem, problem.minimizer, 0.05, 0.05, list(range(0, 401, 20)), n_paths=400)
    with pytest.warns(NotMixedWarning, match="too short for its equilibrium"):
        found = run.equilibrium(lambda x: x[:, 0] / x.norm(dim=1))
    assert float(found.effective_sample_size) <= 11 * 400
    assert " steps, worth" in repr(found)
    assert "tensor" not in repr(found)


@pytest.mark.parametrize("paths", [1, 40])
def test_a_run_in_equilibrium_is_not(paths: int) -> None:
    """Independent states: a false alarm has the probability 6e-7."""
    generator = torch.Generator().manual_seed(2)
    ys = torch.randn(800, paths, 3, generator=generator, dtype=torch.float64)
    times = torch.arange(800, dtype=torch.float64)
    run = Solution(times, ys, torch.zeros(800, paths), stats={}, config={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run.equilibrium(lambda x: x[:, :2])
    assert bool((found.mean.abs() < 5.0 * found.standard_error).all())
    assert repr(found).startswith(
        f"average in equilibrium: {float(found.mean[0]):.4g} ± {float(found.standard_error[0]):.2g}"
    )
    assert f"paths after {found.burn_in:g} of its time, worth" in repr(found)
    assert f"bias     at most {float(found.bias.max()):.2g}, by what" in repr(found)
    assert f"time at most {float(found.relaxation_time.max()):.4g} of its" in repr(found)
    drifting = dataclasses.replace(run, ys=ys + times[:, None, None] / 100.0)
    with pytest.warns(NotMixedWarning):
        drifting.equilibrium(lambda x: x[:, :2])
