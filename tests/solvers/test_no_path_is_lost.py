"""No path is lost at the default step: 12 problems, all schemes, 100,000 paths each.

Where the law is known, the mean of a coordinate is right, too: within 4 standard errors (false
alarm 6e-5 each) and the weak error: 1e-3, for which the default step of weak order 2 is chosen, and
1e-2 at the default step of the schemes of order 1, which is 1/64 of the clock.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manifold_sde import (
    DirectionDiffusion,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    SphericalNoise,
    problems,
)
from manifold_sde.solvers import solve
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.verification.exact import CircleDiffusion, SphereLaw

pytestmark = pytest.mark.thorough

#: Number of paths, and of those by the Ito-Taylor scheme, which takes up to 2000 times as long.
PATHS, FEW = 100_000, 200
LIMIT, WEAK_ERROR = 4.0, {1: 1e-2, 2: 1e-3}


def samples_disagree() -> Problem:
    """Sampling noise whose trace varies along a circle of minimisers."""

    def losses(x: Tensor) -> Tensor:
        y = x / x.norm()
        signs = torch.tensor([-1.0, 1.0], dtype=x.dtype)
        return (1.0 + 0.5 * y[0]) * (0.5 * y[2] ** 2 + signs * (y[2] + 0.5 * y[0] * y[1]))

    return Problem(losses, 3, SamplingNoise(), rank=1)


def network() -> Problem:
    """Four weights before a normalisation."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(2, 4, bias=False), nn.LayerNorm(4, eps=0.0, elementwise_affine=False)
    )
    inputs = torch.randn(2, 2)
    targets = module.double()(inputs.double()).detach()
    return Problem.from_module(
        module, nn.MSELoss(), inputs.double(), targets, SphericalNoise(0.5), rank=4
    )


def linear(**options: Any) -> Callable[[], Problem]:
    return lambda: problems.normalized_linear(**options)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "great circle": lambda: problems.great_circle(noise_scale=1.0),
    "circle, curvature 16-fold": lambda: problems.varying_circle(0.6, noise_scale=1.0),
    "circle, curvature 360-fold": lambda: problems.varying_circle(0.9, noise_scale=1.0),
    "mixed noise": problems.mixed_noise_circle,
    "2-sphere": lambda: problems.great_sphere(4, noise_scale=1.0),
    "4-sphere": lambda: problems.great_sphere(6, noise_scale=1.0),
    "section 6.1": linear(),
    "section 6.1, small circle": linear(seed=1),
    "section 6.1, D = 4": linear(dim=4, n_samples=2, seed=1),
    "section 6.1, D = 12": linear(dim=12, n_samples=10, seed=3),
    "samples disagree": samples_disagree,
    "network": network,
}


def exact(name: str, problem: Problem) -> Callable[[float], float] | None:
    """E of the first coordinate at a clock u, where it is known."""
    if "sphere" in name:
        return lambda u: float(SphereLaw.of(problem).mean(u)[0])
    if name in ("great circle", "circle, curvature 16-fold", "circle, curvature 360-fold"):
        return lambda u: float(CircleDiffusion.reversible(problem).expectation(np.cos, u))
    return None


def start_of(problem: Problem) -> Tensor:
    """A direction of Gamma_1."""
    if problem.facts is not None:
        start = problem.minimizer
    elif problem.dim == 3:
        start = torch.eye(3).double()[0]
    else:
        start = problem.require_network().start
    return start / start.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_path_is_lost(name: str, scheme: str) -> None:
    problem = PROBLEMS[name]()
    calculus = SCHEMES[scheme].calculus or "ito"
    options: dict[str, Any] = {"n_paths": FEW if scheme == "phi_jet" else PATHS}
    options["observables"] = {"first": lambda y: y[:, 0]}
    found = solve(
        DirectionDiffusion(problem, calculus), start_of(problem), [0, 1], method=scheme, **options
    )
    assert found.stats["lost_paths"] == 0
    law = exact(name, problem)
    if law is not None:
        mean, error = (float(v[-1]) for v in found.observed["first"])
        assert abs(mean - law(1.0)) < LIMIT * error + WEAK_ERROR[SCHEMES[scheme].weak_order]


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_path_is_lost_by_the_default(name: str) -> None:
    problem = PROBLEMS[name]()
    found = solve(
        LimitingDiffusion(problem),
        start_of(problem),
        [0, 1],
        n_paths=PATHS,
        observables={"first": lambda y: y[:, 0] / y.norm(dim=1)},
    )
    assert found.stats["lost_paths"] == 0
