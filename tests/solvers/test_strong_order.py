"""Strong orders on nested Brownian paths, for noise that commutes and noise that does not.

The same seed gives the same paths at steps that are halved. The root mean square difference of the
ends at a step and at half of it falls with the strong order. Its slope over the steps is given with
a standard error, from resampling the paths; 0.1 is allowed for the next order.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, DirectionDiffusion, Problem, problems
from manifold_sde.solvers import solve
from manifold_sde.solvers.schemes import SCHEMES

PATHS = 1500
#: Standard errors of a false alarm in 10^4 tests, and what the next order may change.
THRESHOLD, NEXT_ORDER = 3.9, 0.1
#: Numbers of steps.
COUNTS = (4, 8, 16, 32)


def one_column(x: Tensor) -> Tensor:
    """Along the great circle x_3 = 0, of a size that varies: one noise commutes with itself."""
    cos, sin = x[0] / x[:2].norm(), x[1] / x[:2].norm()
    size = 0.3 * (1.0 + 0.7 * (8.0 * cos**4 - 8.0 * cos**2 + 1.0))
    return (size * torch.stack([-sin, cos, 0.0 * cos]) / x.norm())[:, None]


def two_columns(x: Tensor) -> Tensor:
    """Two noises along the circle, whose ratio varies."""
    cos, sin = x[0] / x[:2].norm(), x[1] / x[:2].norm()
    along = torch.stack([-sin, cos, 0.0 * cos])
    sizes = torch.stack([1.0 + 0.7 * cos, 1.0 + 0.7 * sin])
    return 0.3 * along[:, None] * sizes / x.norm()


PROBLEMS = {
    "one column": problems.great_circle(noise=CustomNoise(one_column)),
    "two columns": problems.great_circle(noise=CustomNoise(two_columns)),
    "sphere": problems.great_sphere(4, noise_scale=1.0),
}
TIMES = {"one column": 0.25, "two columns": 0.25, "sphere": 0.125}


@functools.cache
def ends(name: str, method: str, count: int, seed: int = 3) -> Tensor:
    problem, time = PROBLEMS[name], TIMES[name]
    found = solve(
        DirectionDiffusion(problem, SCHEMES[method].calculus or "ito"),
        problem.minimizer,
        [0.0, time],
        n_paths=PATHS,
        method=method,
        dt=time / count,
        seed=seed,
        compile=False,
    )
    assert found.stats["lost_paths"] == 0
    return found.ys[-1]


def slope_of(states: list[Tensor]) -> tuple[float, float]:
    """The strong order, with its standard error."""
    pairs = itertools.pairwise(states)
    squares = np.stack([(a - b).square().sum(-1).numpy() for a, b in pairs])

    def slope(chosen: np.ndarray) -> float:
        sizes = 0.5 * np.log2(squares[:, chosen].mean(1))
        return -float(np.polyfit(np.arange(len(sizes)), sizes, 1)[0])

    generator = np.random.default_rng(0)
    again = [slope(generator.integers(0, PATHS, PATHS)) for _ in range(200)]
    return slope(np.arange(PATHS)), float(np.std(again))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[("sphere", method) for method in ("euler", "heun", "midpoint", "weak2")],
        *[("one column", method) for method in sorted(SCHEMES)],
        ("two columns", "phi_jet"),
    ],
)
def test_declared_strong_orders(name: str, method: str) -> None:
    scheme = SCHEMES[method]
    commutes = name == "one column"
    declared = scheme.strong_order_commutative if commutes else scheme.strong_order
    found, error = slope_of([ends(name, method, count) for count in COUNTS])
    assert error <= 0.04  # orders 1/2 and 1 are told apart
    assert abs(found - declared) <= THRESHOLD * error + NEXT_ORDER, (found, error)


def test_paths_that_are_not_nested_have_no_order() -> None:
    states = [ends("sphere", "heun", count, seed=count) for count in COUNTS]
    found, error = slope_of(states)
    assert abs(found) <= THRESHOLD * error


def bracket(problem: Problem, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The Lie bracket of P sigma w for two vectors w, at one point, by differences."""
    sde = DirectionDiffusion(problem)
    h = 1e-5

    def field(points: Tensor, w: Tensor) -> Tensor:
        return sde.g(torch.zeros(()), points) @ w

    def along(w: Tensor, v: Tensor) -> Tensor:
        move = h * field(x[None], v)[0]
        ahead, behind = field(torch.stack([x + move, x - move]), w)
        return (ahead - behind) / (2.0 * h)

    return along(second, first) - along(first, second)


@pytest.mark.parametrize("name", ["two columns", "sphere"])
def test_the_noise_does_not_commute(name: str) -> None:
    """Neither on the sphere, where the brackets turn it, nor along a circle."""
    problem = PROBLEMS[name]
    if name == "sphere":
        x = torch.tensor([0.6, -0.48, 0.64, 0.0], dtype=torch.float64)
    else:
        x = problem.facts.circle.point(torch.tensor(0.7, dtype=torch.float64))
    first, second = torch.eye(problem.n_noise, dtype=torch.float64)[:2]
    assert float(bracket(problem, x, first, second).norm()) > 0.05
