"""Problems that lack one of the assumptions each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    problems,
)
from manifold_sde.noise import Noise

SPHERICAL = SphericalNoise(0.3)


def of_direction(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x / x.norm())


def residuals(dim: int, function: Callable[[Tensor], Tensor], noise: Noise = SPHERICAL) -> Problem:
    return LeastSquaresProblem(of_direction(function), dim, noise)


def loss(dim: int, function: Callable[[Tensor], Tensor], noise: Noise = SPHERICAL) -> Problem:
    return Problem(of_direction(function), dim, noise)


def with_minimizer(problem: Problem, of: Problem) -> Problem:
    problem.facts = of.facts
    return problem


def slightly_varying_along_rays() -> Problem:
    return Problem(
        lambda x: 0.5 * (x[2] / x.norm()) ** 2 + 1e-3 * torch.tanh((x @ x).log()) * x[0] / x.norm(),
        3,
        SPHERICAL,
    )


def circle_that_moves_with_the_norm() -> Problem:
    def height(x: Tensor) -> Tensor:
        return (x[2] / x.norm() - 0.05 * torch.tanh((x @ x).log()) - 0.1)[None]

    return LeastSquaresProblem(height, 3, SPHERICAL)


def normalised_with_eps() -> Problem:
    return LeastSquaresProblem(lambda x: (x[2] / (x @ x + 1e-3).sqrt())[None], 3, SPHERICAL)


def kink() -> Problem:
    return loss(3, lambda u: 0.5 * u[2] ** 2 * (1.0 + torch.relu(u[0])))


def kink_of_third_order() -> Problem:
    return loss(3, lambda u: 0.5 * u[2] ** 2 * (1.0 + u[0].abs() ** 3))


def flat_at_a_point() -> Problem:
    return residuals(3, lambda u: ((1.0 + u[0]) * u[2])[None])


def of_two_ranks() -> Problem:
    return loss(4, lambda u: 0.5 * (u[3] - 0.6) ** 2 * (u[0] ** 2 + (u[3] + 0.6) ** 2))


def maximum() -> Problem:
    return with_minimizer(loss(3, lambda u: -0.5 * u[2] ** 2), problems.great_circle())


def cubic_saddle() -> Problem:
    problem = loss(4, lambda u: 0.5 * u[3] ** 2 + u[2] ** 3)
    return with_minimizer(problem, problems.great_sphere(4))


def flat_across() -> Problem:
    problem = loss(4, lambda u: 0.5 * u[3] ** 2 + u[2] ** 4)
    return with_minimizer(problem, problems.great_sphere(4))


def two_circles() -> Problem:
    return residuals(3, lambda u: (u[2] * (u[2] - 0.7))[None])


def circle_and_higher_minimum() -> Problem:
    return loss(3, lambda u: 0.5 * (u[2] * (u[2] - 0.7)) ** 2 + 0.02 * u[2])


def two_spheres() -> Problem:
    return residuals(4, lambda u: (u[3] * (u[3] - 0.7))[None])


def two_points() -> Problem:
    return loss(3, lambda u: u[0] ** 2 + u[1] ** 2)


def singular() -> Problem:
    return Problem(lambda x: 0.5 * (x[2] / x[0] * (1.0 + 0.5 * x[1] / x.norm())) ** 2, 3, SPHERICAL)


def two_groups() -> Problem:
    """A great circle, a free circle, and the ratio of the groups' norms, which no sample moves."""

    def samples(x: Tensor) -> Tensor:
        a, b = x[:3] / x[:3].norm(), x[3:] / x[3:].norm()
        tilts = 0.3 * torch.stack([a[0] + 0.2 * b[1], a[1], b[0], b[1] - 0.5 * a[0]])
        return 0.5 * a[2] ** 2 + torch.cat([tilts, -tilts])

    return Problem(samples, 5, SamplingNoise())


def interpolating() -> Problem:
    return residuals(3, lambda u: torch.stack([u[2], u[2] * (1.0 + 0.5 * u[0])]), SamplingNoise())


def vanishing_at_a_point() -> Problem:
    """A circle with sampling noise of two tilts, both stationary at the angle 1 alone."""

    def samples(u: Tensor) -> Tensor:
        a = math.cos(1.0) * u[0] + math.sin(1.0) * u[1]
        b = math.cos(1.0) * u[1] - math.sin(1.0) * u[0]
        tilts = 0.3 * torch.stack([a, b * (1.0 - a)])
        return 0.5 * u[2] ** 2 + torch.cat([tilts, -tilts])

    return loss(3, samples, SamplingNoise())


def missing_one_direction() -> Problem:
    """A 2-sphere, and sampling noise of one tilt."""

    def samples(u: Tensor) -> Tensor:
        return 0.5 * u[3] ** 2 + 0.3 * torch.stack([u[0] * u[1], -u[0] * u[1]])

    return loss(4, samples, SamplingNoise())


def with_radial_noise() -> Problem:
    return problems.great_circle(
        noise=CustomNoise(lambda x: torch.eye(3, dtype=x.dtype) / x.norm())
    )


def of_wrong_degree() -> Problem:
    def factor(x: Tensor) -> Tensor:
        return torch.eye(3, dtype=x.dtype) - torch.outer(x, x) / (x @ x)

    return problems.great_circle(noise=CustomNoise(factor))
