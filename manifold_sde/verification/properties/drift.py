"""The coefficients of (8) and (13): the norm, and the two calculi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_sde.problem import Problem
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.properties import differences
from manifold_sde.verification.properties.defect import (
    Defect,
    flat_points,
    property_check,
    rounding,
)
from manifold_sde.verification.properties.derivatives import NEAR_ACCURACY, Kernel
from manifold_sde.verification.properties.homogeneity import noise_columns, noise_size
from manifold_sde.verification.subject import Subject

#: Ratios C of (8) that are looked at; ``None`` is (13), which is (8) at C = 1/2.
_RATIOS: tuple[float | None, ...] = (None, 0.0, 2.0)
#: Largest |sigma| on the manifold, relative to its size elsewhere, that is no noise.
_NO_NOISE = 1e-6
#: Numbers that the differences of the diffusion matrix may have.
_MOST_NUMBERS = 2**22
#: Largest relative violation of the two properties of sigma with which there is an equation.
_NOISE_TOLERANCE = 1e-6


def has_diffusion(subject: Subject) -> bool:
    """Whether (8) and (13) are defined here: some noise on the manifold, of the right kind."""
    problem, y = subject.problem, subject.start[None]
    if not float(noise_columns(problem, y).norm()) > _NO_NOISE * noise_size(problem, y):
        return False
    invariant = float(problem.scale_invariance_violation()) <= _NOISE_TOLERANCE
    return invariant and max(problem.noise_violations().values()) <= _NOISE_TOLERANCE


def _equation(subject: Subject, ratio: float | None, calculus: str) -> Any:
    own: dict[str, Any] = {"calculus": calculus}
    if subject.by_products:
        own["geometry"] = subject.geometry  # its blocks fit into memory
    if ratio is None:
        return subject.limiting_diffusion(subject.problem, **own)
    return subject.fixed_ratio_diffusion(subject.problem, ratio, **own)


def norm_identity(problem: Problem | Subject, y: Tensor, ratio: float | None = None) -> Defect:
    """The drift moves the norm as -2 c |Y|^2 + tr Sigma says, in both forms of the equation.

    The Stratonovich drift b has <y, b> + c |y|^2 = tr Sigma / 2. The Ito drift has tr(N Sigma N)
    instead of tr Sigma: Ito's formula adds tr(P Sigma P). It is left out where matrices do not
    fit into memory, as it cannot be had by products.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.
        ratio: The ratio C of (8), which is c; ``None`` for (13), where c = 1/2.

    Returns:
        The larger of the two defects, relative to c |y|^2 + tr Sigma + |y| |b|.

    Raises:
        NoiseError: If the noise vanishes on the manifold, or is not of the right kind.

    Source: the equation of |Y|^2 before (10), for (8) and (13).
    """
    subject = Subject.of(problem)
    points = flat_points(y, subject.problem.dim)
    c = 0.5 if ratio is None else ratio
    square = points.square().sum(1)
    kernel = Kernel.of(subject, points / square.sqrt()[:, None])
    trace = subject.problem.noise_trace(points)
    forms: dict[str, Tensor | float] = {"stratonovich": 0.0}
    if not subject.by_products:
        rows = subject.problem.noise_factor(points).mT
        forms["ito"] = kernel.project(rows).square().sum((1, 2))
    time = torch.zeros((), dtype=points.dtype)
    values = []
    for calculus, added in forms.items():
        drift = _equation(subject, ratio, calculus).f(time, points)
        gap = 2.0 * ((points * drift).sum(1) + c * square) + added - trace
        size = c * square + trace + square.sqrt() * drift.norm(dim=1)
        values.append(gap.abs() / size)
    tolerances = rounding(points) * kernel.condition
    shown = "(13)" if ratio is None else f"(8), C = {ratio:g}"
    return Defect.of(
        torch.stack(values).amax(0), tolerances, f"<y, b> + c |y|^2 = tr Sigma / 2 for {shown}"
    )


def stratonovich_tangency(
    problem: Problem | Subject, y: Tensor, ratio: float | None = None
) -> Defect:
    """The Stratonovich drift is tangent to Gamma: it is a vector field on the manifold.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.
        ratio: The ratio C of (8); ``None`` for (13).

    Returns:
        The largest |N b|, relative to |b| and tr Sigma / |y|.

    Raises:
        NoiseError: As :func:`norm_identity`.
    """
    subject = Subject.of(problem)
    points = flat_points(y, subject.problem.dim)
    norms = points.norm(dim=1)
    kernel = Kernel.of(subject, points / norms[:, None])
    time = torch.zeros((), dtype=points.dtype)
    drift = _equation(subject, ratio, "stratonovich").f(time, points)
    shown = "(13)" if ratio is None else f"(8), C = {ratio:g},"
    normal = drift - kernel.project(drift[:, None])[:, 0]
    size = drift.norm(dim=1) + subject.problem.noise_trace(points) / norms
    tolerances = rounding(points) * kernel.condition
    return Defect.of(
        normal.norm(dim=1) / size, tolerances, f"the Stratonovich drift of {shown} is tangent"
    )


def calculus_correction(problem: Problem | Subject, y: Tensor) -> Defect:
    """The drifts of the two forms of (13) differ by half the sum of d(P sigma_j)[P sigma_j].

    The derivatives are taken by differences of the diffusion matrix along the curves
    Phi(y + h P sigma_j), without a derivative of P or sigma.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest difference, relative to tr Sigma / |y| and the drift.

    Raises:
        NoiseError: As :func:`norm_identity`.

    Source: Ito's correction for (13).
    """
    subject = Subject.of(problem)
    points = flat_points(y, subject.problem.dim)
    unit = points / points.norm(dim=1, keepdim=True)
    time = torch.zeros((), dtype=unit.dtype)
    ito, stratonovich = (_equation(subject, None, c) for c in ("ito", "stratonovich"))
    difference = ito.f(time, unit) - stratonovich.f(time, unit)
    columns = ito.g(time, unit).mT
    sizes = columns.norm(dim=2, keepdim=True)
    largest = sizes.amax((1, 2))
    v = columns / torch.where(sizes > 0, sizes, 1.0)

    def diffusion(x: Tensor) -> Tensor:
        z = subject.limits(x)
        known = torch.isfinite(z).all(1)
        values = ito.g(time, torch.where(known[:, None], z, unit[0]))
        return torch.where(known[:, None, None], values, torch.nan)

    m = columns.shape[1]
    accuracy = float(largest.max()) * NEAR_ACCURACY
    derivatives, bound = differences.derivative(diffusion, unit, v, accuracy)
    own = derivatives[:, torch.arange(m), :, torch.arange(m)].movedim(0, 1)
    correction = 0.5 * (own * sizes).sum(1)
    size = subject.problem.noise_trace(unit) + ito.f(time, unit).norm(dim=1)
    values = (difference - correction).norm(dim=1) / size
    truncation = 0.5 * (bound * sizes[..., 0]).sum(1) / size
    condition = Kernel.of(subject, unit).condition
    return Defect.of(
        values,
        truncation + rounding(unit) * condition,
        "Ito - Stratonovich = d(P sigma)[P sigma]/2",
    )


def _check_norm(subject: Subject, effort: Effort) -> list[Defect]:
    if not has_diffusion(subject):
        return []
    y = subject.manifold_points(effort.points)
    # At the norms of training: the drift's parts of degree 1 and -3 then are of one size.
    y = y * subject.norms(len(y)) ** 0.1
    return [norm_identity(subject, y, ratio) for ratio in _RATIOS]


def _check_calculi(subject: Subject, effort: Effort) -> list[Defect]:
    if not has_diffusion(subject):
        return []
    y = subject.manifold_points(effort.points)
    y = y * subject.norms(len(y)) ** 0.1
    defects = [stratonovich_tangency(subject, y, ratio) for ratio in _RATIOS[:2]]
    numbers = subject.problem.dim * subject.problem.n_noise**2 * 6
    if numbers <= _MOST_NUMBERS:
        few = max(1, min(effort.points // 8, _MOST_NUMBERS // numbers))
        defects.append(calculus_correction(subject, y[:few]))
    return defects


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "the norm in the drift of (8) and (13)",
        ("Equation (8)", "Equation (13)"),
        _check_norm,
        "The drift and the noise do not fit together: simulations of (8) and (13) leave the "
        "sphere on which their norm is.",
    ),
    property_check(
        "Ito and Stratonovich forms of (13)",
        ("Equation (13)",),
        _check_calculi,
        "The two forms of the equation are not the same process.",
    ),
)
