"""Degrees of the noise, and that it is orthogonal to the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde import loss_checks
from manifold_sde.problem import Problem
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
)
from manifold_sde.verification.properties.homogeneity import loss_size, points_everywhere
from manifold_sde.verification.subject import Subject

#: Numbers that a batch of factors or covariances may have.
_MOST_NUMBERS = 2**24


def noise_size(problem: Problem, x: Tensor) -> float:
    """Largest |x| |sigma(x)| over the points and fixed directions."""
    points = torch.cat([flat_points(x), loss_checks.fixed_directions(problem.dim).to(x)])
    sizes = points.norm(dim=1) * problem.noise_factor(points).flatten(1).norm(dim=1)
    return max(float(sizes.max()), 1e-300)


def _tolerance(problem: Problem, x: Tensor, size: float) -> float:
    """Rounding of sigma relative to its size: the gradients that it is made of are rounded."""
    return rounding(x) * (1.0 + loss_size(problem, x) / size)


def noise_degree(problem: Problem | Subject, x: Tensor, alpha: Tensor | float) -> Defect:
    """Sigma has degree -2, and its factor sigma -1: sigma(alpha x) = sigma(x) / alpha.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.
        alpha: Positive factors, that broadcast against (...).

    Returns:
        The larger of the two defects, relative to the largest |x| |sigma(x)| and its square.

    Source: section 2, after Lemma 2.5.
    """
    owner = Subject.of(problem).problem
    factors = torch.as_tensor(alpha, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
    points, factors = flat_points(x), factors.reshape(-1, 1)
    norms, size = points.norm(dim=1), noise_size(owner, points)
    scaled = factors * points
    gap = factors[..., None] * owner.noise_factor(scaled) - owner.noise_factor(points)
    first = gap.flatten(1).norm(dim=1) * norms / size
    gap = factors[..., None] ** 2 * owner.noise_covariance(scaled) - owner.noise_covariance(points)
    second = gap.flatten(1).norm(dim=1) * (norms / size) ** 2
    return Defect.of(
        torch.maximum(first, second),
        2.0 * _tolerance(owner, points, size),
        "sigma has degree -1 and Sigma -2",
    )


def noise_is_tangent(problem: Problem | Subject, x: Tensor) -> Defect:
    """The noise does not act along the weights: sigma(x)^T x = 0.

    Args:
        problem: The problem.
        x: Points (..., D), not 0.

    Returns:
        The largest |sigma(x)^T x|, relative to the largest |x| |sigma(x)|.

    Source: Lemma 2.5 for the columns of sigma in (2).
    """
    owner = Subject.of(problem).problem
    points = flat_points(x)
    size = noise_size(owner, points)
    radial = (owner.noise_factor(points) * points[..., None]).sum(1).norm(dim=1)
    return Defect.of(radial / size, _tolerance(owner, points, size), "sigma(x)^T x = 0")


def _points(subject: Subject, effort: Effort) -> tuple[Tensor, Tensor]:
    dim = subject.problem.dim
    most = _MOST_NUMBERS // (dim * max(dim, subject.problem.n_noise))
    return points_everywhere(subject, max(2, min(effort.points, most)))


def _check_degree(subject: Subject, effort: Effort) -> list[Defect]:
    return [noise_degree(subject, *_points(subject, effort))]


def _check_tangent(subject: Subject, effort: Effort) -> list[Defect]:
    x, norms = _points(subject, effort)
    return [noise_is_tangent(subject, x * norms[:, None])]


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "degrees of the noise",
        ("Lemma 2.4",),
        _check_degree,
        "The noise does not grow as 1 / |x| near the origin, as that of SGD does: there is no "
        "intrinsic clock, and (9) to (13) do not hold. Divide the factor by |x|.",
    ),
    property_check(
        "noise orthogonal to the weights",
        ("Lemma 2.5",),
        _check_tangent,
        "The noise moves the norm itself: the equation of the norm holds only in mean. Take the "
        "part along x away from the columns of the factor.",
    ),
)
