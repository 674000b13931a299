"""The derivatives of Phi on the manifold: Lemma 2.8, and what makes the drift of (8) and (13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    with_factors,
)
from manifold_sde.verification.properties.homogeneity import noise_columns, noise_size
from manifold_sde.verification.subject import Subject

#: Absolute accuracy of the limit map at a unit vector close to the manifold, where the flow is
#: short: a hundredth of what is asked of it far away.
NEAR_ACCURACY = 1e-12
#: Largest dimension at which all of the derivative is measured.
_WHOLE = 12
#: Directions in which it is measured otherwise.
_DIRECTIONS = 6
#: How much shorter the steps of differences are in high dimension, where the manifold bends more
#: and each flow takes seconds: those from nearby are the shortest.
_SHORTER = 8.0
#: Most columns of a factor along which differences are taken.
_MOST_COLUMNS = 12


@dataclass(frozen=True)
class Kernel:
    """The kernel of the Hessian at unit vectors on the manifold, from the Hessian alone.

    Attributes:
        project: The orthogonal projection P on ker H: (n, k, D) -> (n, k, D).
        condition: Largest over smallest nonzero eigenvalue of H, (n,).
    """

    project: Callable[[Tensor], Tensor]
    condition: Tensor

    @classmethod
    def of(cls, subject: Subject, y: Tensor) -> Kernel:
        """The kernel at points (n, D); its dimension is D minus the rank that geometry finds.

        Where matrices of D x D do not fit, the rank and the range of H are found by products.
        """
        if subject.by_products:

            def project(v: Tensor) -> Tensor:
                pairs = zip(y, v, strict=True)
                return torch.stack([subject.hessian_range(z).project(own) for z, own in pairs])

            ranges = (subject.hessian_range(z).values for z in y)
            return cls(project, torch.stack([values[-1] / values[0] for values in ranges]))
        values, basis = torch.linalg.eigh(subject.problem.hessian(y))
        rank = subject.geometry.rank(y)
        split = y.shape[-1] - rank
        tangent = torch.arange(y.shape[-1], device=y.device) < split[:, None]
        kernel = torch.where(tangent[:, None], basis, 0.0)
        smallest = values.gather(1, split.clamp(max=y.shape[-1] - 1)[:, None])[:, 0]
        condition = torch.where(rank > 0, values[:, -1] / smallest, 1.0)
        projectors = kernel @ kernel.mT
        return cls(lambda v: v @ projectors, condition)


def directions_at(y: Tensor) -> Tensor:
    """Directions (k, D): all coordinates in small dimensions, a few fixed random ones otherwise."""
    dim = y.shape[-1]
    if dim <= _WHOLE:
        return torch.eye(dim, dtype=y.dtype, device=y.device)
    fixed = loss_checks.fixed_directions(dim, _DIRECTIONS).to(y)
    return torch.linalg.qr(fixed.T)[0].T.contiguous()


@implements("Lemma 2.8")
def projector(problem: Problem | Subject, y: Tensor) -> Defect:
    """The derivative of Phi at y, by differences of Phi, is the orthogonal projector on ker H.

    In up to 12 dimensions it is measured whole: what is compared then fixes its rank D - M, its
    range T_y(Gamma) = ker H, and that it is symmetric. In more, it is measured along a few random
    directions, along which two different matrices differ; where H does not fit into memory, along
    one, and along the eigenvector of its smallest nonzero eigenvalue.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest |d Phi(y) v - P v| over unit vectors v, and |d Phi(y) y - y| / |y|.

    Source: Lemma 2.8.
    """
    subject = Subject.of(problem)
    unit, kernel, v = _at(subject, y)
    measured, bound = _first_differences(subject, unit, v)
    expected = kernel.project(v)
    if not subject.by_products:
        expected[:, -1] = unit
    values = (measured - expected).norm(dim=2)
    tolerances = bound + rounding(unit) * kernel.condition[:, None]
    return Defect.of(values, tolerances, "d Phi = projector on ker H, d Phi y = y")


@implements("Lemma 2.8")
def tangent_projection(problem: Problem | Subject, y: Tensor) -> Defect:
    """What geometry takes for the derivative of Phi is it: the orthogonal projector on ker H.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest |P v - P_geometry v| over unit vectors v as in :func:`projector`: with P from
        the Hessian, and with d Phi(y) v by differences of Phi in its place as far as these can
        tell.

    Source: Lemma 2.8.
    """
    subject = Subject.of(problem)
    unit, kernel, v = _at(subject, y)
    claimed = subject.geometry.tangent_projection(unit[:, None].expand_as(v).contiguous(), v)
    measured, bound = _first_differences(subject, unit, v)
    exact = rounding(unit) * kernel.condition[:, None]
    from_hessian = (claimed - kernel.project(v)).norm(dim=2)
    from_limits = (claimed - measured).norm(dim=2)
    values = torch.cat([from_hessian, from_limits])
    return Defect.of(values, torch.cat([exact.expand_as(bound), bound + exact]), "P of geometry")


def _first_differences(subject: Subject, unit: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    step = differences.FIRST / (_SHORTER if subject.by_products else 1.0)
    return differences.derivative(subject.limits, unit, v, NEAR_ACCURACY, step)


def _at(subject: Subject, y: Tensor) -> tuple[Tensor, Kernel, Tensor]:
    """Unit vectors (n, D), the kernels there, and directions (n, k, D), the last one y.

    Where H does not fit into memory they are two, neither of them y.
    """
    points = flat_points(y, subject.problem.dim)
    unit = points / points.norm(dim=1, keepdim=True)
    if subject.by_products:
        # A rank that is one too small or too large shows along the flattest normal direction.
        flattest = torch.stack([subject.hessian_range(z).eigenvector(0) for z in unit])
        others = loss_checks.fixed_directions(unit.shape[1], 1).to(unit).expand_as(unit)
        v = torch.stack([flattest, others], 1)
    else:
        others = directions_at(unit)
        v = torch.cat([others.expand(len(unit), *others.shape), unit[:, None]], 1)
    return unit, Kernel.of(subject, unit), v


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
    points = flat_points(y, subject.problem.dim)
    norms = points.norm(dim=1)
    unit = points / norms[:, None]
    columns = _factor(unit, factor)
    claimed = subject.geometry.second_derivative(points, factor=columns) * norms[:, None]
    sizes = columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    v = (columns / sizes).mT.contiguous()
    step = differences.SECOND / (_SHORTER if subject.by_products else 1.0)
    measured, bound = differences.second_derivative(subject.limits, unit, v, NEAR_ACCURACY, step)
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
    points, scale = with_factors(y, alpha, subject.problem.dim)
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
    three forms: not at all, whole, and as its factor; where it does not fit into memory, as
    products of the factor with fixed vectors.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest difference, relative to tr Sigma and to what rounding makes of it where the
        noise vanishes, as at interpolation.

    Source: second derivative of |Phi(x)| = |x| along N Sigma N, and (5).
    """
    subject = Subject.of(problem)
    points = flat_points(y, subject.problem.dim)
    owner, kernel = subject.problem, _kernel(subject, points)
    geometry = subject.geometry
    if subject.by_products:
        factor = noise_columns(owner, points)
        forms = [geometry.second_derivative(points, factor=factor)]
    else:
        factor = owner.noise_factor(points)
        forms = [
            geometry.second_derivative(points),
            geometry.second_derivative(points, owner.noise_covariance(points)),
            geometry.second_derivative(points, factor=factor),
        ]
    rows = factor.mT.contiguous()
    expected = (rows - kernel.project(rows)).square().sum((1, 2))
    norms, noise = points.norm(dim=1), factor.flatten(1).norm(dim=1)
    size = noise * (noise + noise_size(owner, points) / norms) + norms * forms[0].norm(dim=1)
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


def _check_first(subject: Subject, effort: Effort) -> list[Defect]:
    y = subject.manifold_points(max(min(2, effort.points), effort.points // 8))
    if subject.by_products:
        return [tangent_projection(subject, y)]  # which has both comparisons in it
    return [projector(subject, y), tangent_projection(subject, y)]


def _check_second(subject: Subject, effort: Effort) -> list[Defect]:
    problem = subject.problem
    y = subject.manifold_points(max(min(2, effort.points), effort.points // 2))
    shape = (len(y), problem.dim, 1 if subject.by_products else 2)
    sizes = spread_norms(subject, len(y))
    random = subject.normals(20, *shape)
    defects = [second_derivative(subject, y, random)]
    if problem.n_noise <= _MOST_COLUMNS and not subject.by_products and _has_noise(problem, y[:1]):
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
        "the derivative of Phi is the orthogonal projector",
        ("Lemma 2.8",),
        _check_first,
        "The tangent space of the manifold is not the kernel of the Hessian, as where its rank "
        "is not constant (Assumption 2.1), or Phi is not the limit of gradient flow.",
    ),
    property_check(
        "the second derivative of Phi",
        ("Equation (5)", "Equation (8)", "Equation (13)"),
        _check_second,
        "The drift that the noise causes along the manifold is wrong: no simulation of (8), (13) "
        "or of the direction can be trusted on this problem.",
    ),
)
