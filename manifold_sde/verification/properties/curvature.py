"""The second derivative of Phi on the manifold, which makes the drift of (5), (8) and (13)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from manifold_sde import loss_checks
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties import differences
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
    spread_norms,
)
from manifold_sde.verification.properties.tangent_space import NEAR_ACCURACY, Kernel
from manifold_sde.verification.subject import Subject

#: Most columns of a factor along which differences are taken.
_MOST_COLUMNS = 12


@implements("Equation (5)")
def second_derivative(
    problem: Problem | Subject, y: Tensor, factor: Tensor | None = None
) -> Defect:
    """d^2 Phi(y)[F F^T] of geometry is the sum of second differences of Phi along the columns.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.
        factor: Factor F (..., D, m) of the covariance; by default two fixed random columns, which
            have a tangent, a normal and a mixed part at almost every point.

    Returns:
        The largest difference, relative to |F|^2 / |y|.

    Source: the drift of equations (5), (8) and (13).
    """
    subject = Subject.of(problem)
    points = flat_points(y)
    norms = points.norm(dim=1)
    unit = points / norms[:, None]
    columns = _factor(unit, factor)
    claimed = subject.geometry.second_derivative(points, factor=columns) * norms[:, None]
    sizes = columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    v = (columns / sizes).mT.contiguous()
    measured, bound = differences.second_derivative(subject.limits, unit, v, NEAR_ACCURACY)
    weights = (sizes**2).mT
    total = weights.sum((1, 2))
    values = (claimed - (measured * weights).sum(1)).norm(dim=1) / total
    truncation = (bound * weights[..., 0]).sum(1) / total
    condition = Kernel.of(subject, unit).condition
    tolerances = truncation + rounding(unit) * condition
    return Defect.of(values, tolerances, "d2 Phi[Sigma] = second differences of Phi")


def second_derivative_degree(
    problem: Problem | Subject, y: Tensor, alpha: Tensor | float, factor: Tensor | None = None
) -> Defect:
    """d^2 Phi has degree -1: d^2 Phi(alpha y)[A] = d^2 Phi(y)[A] / alpha.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.
        alpha: Positive factors, that broadcast against (...).
        factor: Factor of A, as in :func:`second_derivative`.

    Returns:
        The largest difference, relative to |A| and to the size of the second derivative.

    Source: Lemmas 2.4 and 2.7.
    """
    subject = Subject.of(problem)
    scale = torch.as_tensor(alpha, dtype=y.dtype, device=y.device).expand(y.shape[:-1])
    points, scale = flat_points(y), scale.reshape(-1, 1)
    norms = points.norm(dim=1, keepdim=True)
    unit, columns = points / norms, _factor(points / norms, factor)
    here = norms * subject.geometry.second_derivative(points, factor=columns)
    there = norms * scale * subject.geometry.second_derivative(scale * points, factor=columns)
    size = columns.square().sum((1, 2)) + here.norm(dim=1)
    tolerances = rounding(unit) * Kernel.of(subject, unit).condition
    return Defect.of((there - here).norm(dim=1) / size, tolerances, "d2 Phi has degree -1")


def normal_trace(problem: Problem | Subject, y: Tensor) -> Defect:
    """<y, d^2 Phi(y)[Sigma]> = tr(N Sigma N) with the noise of the problem, N = I - P.

    It is what holds the diffusion on the sphere of its norm. Sigma is given to geometry in its
    three forms: not at all, whole, and as its factor.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest difference, relative to tr Sigma.

    Source: second derivative of |Phi(x)| = |x| along N Sigma N, and (5).
    """
    subject = Subject.of(problem)
    points = flat_points(y)
    owner, kernel = subject.problem, _kernel(subject, points)
    sigma, factor = owner.noise_covariance(points), owner.noise_factor(points)
    normal = torch.eye(points.shape[1]).to(points) - kernel.projectors
    expected = (normal @ factor).square().sum((1, 2))
    geometry = subject.geometry
    forms = [
        geometry.second_derivative(points),
        geometry.second_derivative(points, sigma),
        geometry.second_derivative(points, factor=factor),
    ]
    size = factor.square().sum((1, 2)) + points.norm(dim=1) * forms[0].norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    gaps = torch.stack([((points * form).sum(1) - expected).abs() / size for form in forms])
    tolerances = rounding(points) * kernel.condition
    return Defect.of(gaps.amax(0), tolerances, "<y, d2 Phi[Sigma]> = tr(N Sigma N)")


def _kernel(subject: Subject, points: Tensor) -> Kernel:
    return Kernel.of(subject, points / points.norm(dim=1, keepdim=True))


def _factor(unit: Tensor, factor: Tensor | None) -> Tensor:
    """The factor at points (n, D): (n, D, m)."""
    if factor is None:
        fixed = loss_checks.fixed_directions(unit.shape[1], 4)[2:].to(unit).T
        return fixed.expand(len(unit), *fixed.shape).contiguous()
    return factor.reshape(-1, *factor.shape[-2:]).expand(len(unit), *factor.shape[-2:])


def _check(subject: Subject, effort: Effort) -> list[Defect]:
    problem = subject.problem
    y = subject.manifold_points(max(2, effort.points // 2))
    shape = (len(y), problem.dim, 2)
    sizes = spread_norms(subject, len(y))
    random = subject.normals(20, *shape)
    defects = [second_derivative(subject, y, random)]
    if problem.n_noise <= _MOST_COLUMNS and _has_noise(problem, y[:1]):
        few = y[: max(2, effort.points // 8)]
        own = problem.noise_factor(few)
        along = second_derivative(subject, few, own)
        defects.append(replace(along, detail=f"the same along the columns of {problem.noise}"))
    return [
        *defects,
        second_derivative_degree(subject, y, sizes, random),
        normal_trace(subject, y * sizes[:, None]),
    ]


def _has_noise(problem: Problem, y: Tensor) -> bool:
    return bool((problem.noise_trace(y) > 0).all())


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "the second derivative of Phi",
        ("Equation (5)", "Equation (8)", "Equation (13)"),
        _check,
        "The drift that the noise causes along the manifold is wrong: no simulation of (8), (13) "
        "or of the direction can be trusted on this problem.",
    ),
)
