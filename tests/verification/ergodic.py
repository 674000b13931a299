"""Problems and broken parts that the tests of the checks of ergodicity share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_sde import CustomNoise, LeastSquaresProblem, Problem, SphericalNoise, problems
from manifold_sde.problems.facts import Circle
from manifold_sde.solvers import solve
from manifold_sde.verification import Effort, Result, Subject
from manifold_sde.verification.check import Check
from manifold_sde.verification.laws.long_runs import LongRuns

#: Some hundred runs: seconds a check.
SMALL = Effort("small", points=8, departure=0.3)


def run(check: Check, subject: Subject, effort: Effort = SMALL) -> Result:
    """The one result of a check."""
    (result,) = check(subject, effort)
    return result


def with_solver(problem: Problem, solver: Callable[..., Any], seed: int = 0) -> Subject:
    """A subject whose solver is another one."""
    return replace(Subject.of(problem, seed=seed), solve=solver)


def borrowing(subject: Subject, source: Subject, effort: Effort = SMALL) -> Subject:
    """The subject, with the walk and the exact law of a subject of the same problem."""
    subject.__dict__["walks"] = source.walks
    LongRuns.of(subject, effort).__dict__["law"] = LongRuns.of(source, effort).law
    return subject


def on_another(problem: Problem) -> Callable[..., Any]:
    """A solver that takes the coefficients of another problem."""

    def wrong(sde: Any, *args: Any, **options: Any) -> Any:
        return solve(type(sde)(problem, calculus=sde.calculus), *args, **options)

    return wrong


def with_drift(factor: float, noise_scale: float = 0.3) -> Problem:
    """``varying_circle`` with log pdet H, and so the drift of d^2 Phi, times a factor."""
    made = LeastSquaresProblem(
        lambda x: (1.0 + 0.5 * x[:1] / x.norm()) ** factor * x[2:] / x.norm(),
        3,
        SphericalNoise(noise_scale),
        rank=1,
    )
    made.facts = replace(
        problems.varying_circle().facts, circle=problems.great_circle().facts.circle
    )
    return made


def two_circles(height: float = 0.4) -> Problem:
    """Two circles of minimisers, above and below the equator."""
    return Problem(
        lambda x: 0.5 * ((x[2] / x.norm()) ** 2 - height**2) ** 2, 3, SphericalNoise(0.3), rank=1
    )


def _varying_trace(x: Tensor) -> Tensor:
    norm = x.norm()
    u = x / norm
    up = torch.zeros_like(x).index_fill(0, torch.tensor([2]), 1.0)
    up = up - u * u[2]
    along = torch.linalg.cross(u, up)
    size = torch.sqrt(2.0 + 1.9 * u[0])
    return 0.3 * torch.stack([along, size * up], 1) / norm


def circle_with_varying_trace() -> Problem:
    """A great circle with uniform noise along it, and noise across that varies.

    The equilibrium in the clock is uniform, pi is nearly proportional to V, 3 + 1.9 cos theta.
    """
    return problems.great_circle(noise=CustomNoise(_varying_trace))


def two_groups(coupled: bool = True, scale: float = 0.5, second: float = 1.0) -> Problem:
    """Two groups of three weights, a great circle each, with noise that keeps each group.

    That of the second group is larger by a factor.
    """

    def loss(x: Tensor) -> Tensor:
        a, b = x[:3] / x[:3].norm(), x[3:] / x[3:].norm()
        return 0.5 * a[2] ** 2 + 0.5 * b[2] ** 2

    def factor(x: Tensor) -> Tensor:
        parts = []
        units = [x[:3] / x[:3].norm(), x[3:] / x[3:].norm()]
        for i, part in enumerate((x[:3], x[3:])):
            u, other = units[i], units[1 - i]
            size = torch.sqrt(1.0 + 0.8 * other[0]) if coupled else torch.ones(()).to(x)
            size = second**i * size
            identity = torch.eye(3, dtype=x.dtype)
            parts.append(scale * size / part.norm() * (identity - torch.outer(u, u)))
        return torch.block_diag(*parts)

    return Problem(loss, 6, CustomNoise(factor), rank=2)


def unit_circle() -> Circle:
    """The great circle x_3 = 0."""
    circle = problems.great_circle().facts.circle
    assert circle is not None
    return circle
