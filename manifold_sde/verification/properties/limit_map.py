"""The limit map of gradient flow: Lemma 2.7, and the flow itself by SciPy."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from manifold_sde.errors import LimitMapError
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
    spread_norms,
    with_factors,
)
from manifold_sde.verification.subject import Subject

#: Accuracy of the limit map, relative to the norm: what ``Geometry`` asks of each step of its
#: flow by default, with a factor of 100 for what the steps add up to.
LIMIT_ACCURACY = {torch.float64: 1e-8, torch.float32: 1e-3}
#: Relative tolerances of SciPy's integrator: the run, and the rougher one that says how good it is.
_FINE, _ROUGH = 1e-10, 1e-7
#: Time of the flow, in units of the slowest time scale at its end: exp(-40) is rounding.
_RELAXATIONS = 40.0
#: Largest number of coordinates that are integrated together.
_COORDINATES = 200


def limit_accuracy(x: Tensor) -> float:
    """Accuracy of the limit map relative to the norm, for the dtype of x."""
    return LIMIT_ACCURACY.get(x.dtype, 1e-1)


@implements("Lemma 2.7")
def limit_map_degree(problem: Problem | Subject, x: Tensor, alpha: Tensor | float) -> Defect:
    """U is a cone on which Phi has degree 1: Phi(alpha x) = alpha Phi(x), where it is defined.

    Args:
        problem: The problem.
        x: Points (..., D) of the attraction set.
        alpha: Positive factors, that broadcast against (...).

    Returns:
        The largest |Phi(alpha x) / alpha - Phi(x)| / |x|; infinite where alpha x does not flow to
        the manifold.

    Raises:
        LimitMapError: If a point x is not in the attraction set.

    Source: Lemma 2.7.
    """
    subject = Subject.of(problem)
    points, factors = with_factors(x, alpha, subject.problem.dim)
    here = subject.geometry.limit_map(points)
    there = subject.limits(factors * points) / factors
    values = (there - here).norm(dim=1) / points.norm(dim=1)
    return Defect.of(values, limit_accuracy(points), "Phi(a x) = a Phi(x)")


def limit_map_idempotent(problem: Problem | Subject, x: Tensor) -> Defect:
    """Phi(Phi(x)) = Phi(x): the points of Gamma are at rest.

    Args:
        problem: The problem.
        x: Points (..., D) of the attraction set.

    Returns:
        The largest |Phi(Phi(x)) - Phi(x)| / |x|.

    Source: Definition 2.6.
    """
    subject = Subject.of(problem)
    points = flat_points(x, subject.problem.dim)
    once = subject.geometry.limit_map(points)
    values = (subject.limits(once) - once).norm(dim=1) / points.norm(dim=1)
    return Defect.of(values, limit_accuracy(points), "Phi(Phi(x)) = Phi(x)")


def limit_map_norm(problem: Problem | Subject, x: Tensor) -> Defect:
    """|Phi(x)| = |x|: the gradient is orthogonal to x, so that its flow keeps the norm.

    Args:
        problem: The problem.
        x: Points (..., D) of the attraction set.

    Returns:
        The largest | |Phi(x)| - |x| | / |x|.

    Source: Lemma 2.5 along the flow of Definition 2.6.
    """
    subject = Subject.of(problem)
    points = flat_points(x, subject.problem.dim)
    norms = points.norm(dim=1)
    values = (subject.geometry.limit_map(points).norm(dim=1) - norms).abs() / norms
    tolerance = rounding(points) if points.dtype == torch.float64 else limit_accuracy(points)
    return Defect.of(values, tolerance, "|Phi(x)| = |x|")


@implements("Definition 2.6")
def limit_map_flow(problem: Problem | Subject, x: Tensor) -> Defect:
    """Phi(x) is where gradient flow from x ends, by SciPy's LSODA in the whole space.

    The flow is followed from x itself, whatever its norm, for 40 times its slowest time scale, at
    two tolerances: their difference, and the finer tolerance, say how far the flow can be off.

    Args:
        problem: The problem.
        x: A few points (..., D) of the attraction set.

    Returns:
        The largest |Phi(x) - flow| / |x|.

    Source: Definition 2.6.
    """
    subject = Subject.of(problem)
    points = flat_points(x, subject.problem.dim).double()
    claimed = subject.geometry.limit_map(points)
    norms = points.norm(dim=1)
    values, tolerances = [], []
    size = max(1, _COORDINATES // points.shape[1])
    for rows in torch.arange(len(points)).split(size):
        fine, rough = (_flow(subject, points[rows], claimed[rows], r) for r in (_FINE, _ROUGH))
        values.append((fine - claimed[rows]).norm(dim=1) / norms[rows])
        # The rougher run's error over the finer one's is about the ratio of the tolerances; the
        # root of that ratio is kept as a margin.
        spread = (fine - rough).norm(dim=1) / norms[rows]
        tolerances.append(spread * math.sqrt(_FINE / _ROUGH) + LIMIT_ACCURACY[torch.float64])
    return Defect.of(torch.cat(values), torch.cat(tolerances), "Phi(x) = end of gradient flow")


def _flow(subject: Subject, x: Tensor, limits: Tensor, rtol: float) -> Tensor:
    """The end of gradient flow from points (n, D), all in one system of their own time scales."""
    problem, (n, dim) = subject.problem, x.shape
    eigenvalues = torch.linalg.eigvalsh(problem.hessian(limits))
    ranks = subject.geometry.rank(limits)
    slowest = eigenvalues.gather(1, (dim - ranks)[:, None].clamp(max=dim - 1))
    times = torch.where(ranks[:, None] > 0, _RELAXATIONS / slowest, 0.0)

    def force(_: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        z = torch.from_numpy(state).reshape(n, dim)
        return (-times * problem.gradient(z)).flatten().numpy()

    def jacobian(_: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        z = torch.from_numpy(state).reshape(n, dim)
        return torch.block_diag(*(-times[..., None] * problem.hessian(z))).numpy()

    scale = np.repeat(x.norm(dim=1).numpy(), dim)
    done = solve_ivp(
        force,
        (0.0, 1.0),
        x.flatten().numpy(),
        method="LSODA",
        jac=jacobian,
        rtol=rtol,
        atol=rtol * scale,
    )
    end = torch.from_numpy(np.ascontiguousarray(done.y[:, -1])).reshape(n, dim)
    return end if done.success else torch.full_like(end, math.nan)


def _points(subject: Subject, effort: Effort) -> Tensor:
    x = subject.attraction_points(effort.points)
    if subject.by_products and len(x):
        return x
    return torch.cat([x, subject.manifold_points(max(1, effort.points // 4))])


def _check_degree(subject: Subject, effort: Effort) -> list[Defect]:
    x = _points(subject, effort)
    return [limit_map_degree(subject, x, spread_norms(subject, len(x)))]


def _check_limits(subject: Subject, effort: Effort) -> list[Defect]:
    x = _points(subject, effort)
    x = x * spread_norms(subject, len(x))[:, None]
    return [limit_map_idempotent(subject, x), limit_map_norm(subject, x)]


def _check_flow(subject: Subject, effort: Effort) -> list[Defect]:
    count = max(1, min(effort.points // 8, 2 * _COORDINATES // subject.problem.dim))
    x = subject.attraction_points(count)
    if not len(x):
        raise LimitMapError(
            "no point near the manifold flows to it",
            received="gradient flow from points up to 0.3 away",
            expected="an open attraction set (Lemma 2.7)",
            remedy="x_init=x, with x on or near the manifold of minimisers",
        )
    # The norm is another one at each point: nothing is divided out here.
    return [limit_map_flow(subject, x * subject.norms(len(x)) ** 0.25)]


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "the attraction set is a cone and Phi 1-homogeneous",
        ("Lemma 2.7",),
        _check_degree,
        "The limit map does not scale with the weights: the loss is not scale-invariant, or the "
        "flow is not followed accurately (Geometry(rtol=...)).",
    ),
    property_check(
        "Phi fixes the manifold and keeps the norm",
        ("Definition 2.6", "Lemma 2.7"),
        _check_limits,
        "What Phi returns is not a point of the manifold at the norm of x.",
    ),
    property_check(
        "Phi against SciPy's gradient flow",
        ("Definition 2.6",),
        _check_flow,
        "The limit map is not where gradient flow ends: the nearest point of the manifold, say, "
        "differs from it at second order, and gives another diffusion.",
    ),
)
