"""The derivative of Phi on the manifold: Lemma 2.8."""

from __future__ import annotations

from dataclasses import dataclass

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
)
from manifold_sde.verification.subject import Subject

#: Absolute accuracy of the limit map at a unit vector close to the manifold, where the flow is
#: short: a hundredth of what is asked of it far away.
NEAR_ACCURACY = 1e-12
#: Largest dimension at which all of the derivative is measured.
_WHOLE = 12
#: Directions in which it is measured otherwise.
_DIRECTIONS = 6


@dataclass(frozen=True)
class Kernel:
    """The kernel of the Hessian at unit vectors on the manifold, from the Hessian alone.

    Attributes:
        projectors: Orthogonal projectors P on ker H, (n, D, D).
        condition: Largest over smallest nonzero eigenvalue of H, (n,).
    """

    projectors: Tensor
    condition: Tensor

    @classmethod
    def of(cls, subject: Subject, y: Tensor) -> Kernel:
        """The kernel at points (n, D); its dimension is D minus the rank that geometry finds."""
        values, basis = torch.linalg.eigh(subject.problem.hessian(y))
        rank = subject.geometry.rank(y)
        split = y.shape[-1] - rank
        tangent = torch.arange(y.shape[-1], device=y.device) < split[:, None]
        kernel = torch.where(tangent[:, None], basis, 0.0)
        smallest = values.gather(1, split.clamp(max=y.shape[-1] - 1)[:, None])[:, 0]
        condition = torch.where(rank > 0, values[:, -1] / smallest, 1.0)
        return cls(kernel @ kernel.mT, condition)


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
    directions, along which two different matrices differ.

    Args:
        problem: The problem.
        y: Points (..., D) of Gamma.

    Returns:
        The largest |d Phi(y) v - P v| over unit vectors v, and |d Phi(y) y - y| / |y|.

    Source: Lemma 2.8.
    """
    subject = Subject.of(problem)
    unit, kernel, v = _at(subject, y)
    measured, bound = differences.derivative(subject.limits, unit, v, NEAR_ACCURACY)
    expected = v @ kernel.projectors
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
        The largest |P v - P_geometry v| over unit vectors v as in :func:`projector`, y / |y| among
        them: with P from the Hessian, and with d Phi(y) v by differences of Phi in its place as
        far as these can tell.

    Source: Lemma 2.8.
    """
    subject = Subject.of(problem)
    unit, kernel, v = _at(subject, y)
    claimed = subject.geometry.tangent_projection(unit[:, None].expand_as(v).contiguous(), v)
    measured, bound = differences.derivative(subject.limits, unit, v, NEAR_ACCURACY)
    exact = rounding(unit) * kernel.condition[:, None]
    from_hessian = (claimed - v @ kernel.projectors).norm(dim=2)
    from_limits = (claimed - measured).norm(dim=2)
    values = torch.cat([from_hessian, from_limits])
    return Defect.of(values, torch.cat([exact.expand_as(bound), bound + exact]), "P of geometry")


def _at(subject: Subject, y: Tensor) -> tuple[Tensor, Kernel, Tensor]:
    """Unit vectors (n, D), the kernels there, and directions (n, k, D), the last one y."""
    points = flat_points(y)
    unit = points / points.norm(dim=1, keepdim=True)
    others = directions_at(unit)
    v = torch.cat([others.expand(len(unit), *others.shape), unit[:, None]], 1)
    return unit, Kernel.of(subject, unit), v


def _check(subject: Subject, effort: Effort) -> list[Defect]:
    y = subject.manifold_points(max(2, effort.points // 8))
    return [projector(subject, y), tangent_projection(subject, y)]


#: The checks of this module.
CHECKS: tuple[Check, ...] = (
    property_check(
        "the derivative of Phi is the orthogonal projector",
        ("Lemma 2.8",),
        _check,
        "The tangent space of the manifold is not the kernel of the Hessian, as where its rank "
        "is not constant (Assumption 2.1), or Phi is not the limit of gradient flow.",
    ),
)
