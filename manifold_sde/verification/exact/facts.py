"""What the exact laws read off a problem: its noise, its start, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.minimizers import find_minimizer
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.time_scale import TimeScale
from manifold_sde.verification.exact.inputs import check_time
from manifold_sde.verification.exact.spectral import Array

#: At this learning rate and weight decay R is 1 throughout, (12) reads tau(t) = t, and so the
#: functions of steps of a TimeScale are functions of the time T of (13).
_LIMIT = TimeScale(1.0, 0.5)
#: Largest spread of log pdet H on Gamma_1 that counts as rounding.
_CONSTANT = 1e-8
#: What is known of some problems in closed form, and what to give where it is not.
_FACTS = {
    "circle": ("a circle of minimisers", "CircleDiffusion.of(problem, TracedCurve.of(problem, y))"),
    "limit_map": ("Phi", "a map of the circle or sphere onto Gamma_1, where one can be given"),
    "log_pseudo_determinant": ("log pdet H", "CircleDiffusion.of(problem, curve) needs none"),
    "minimizer": ("a minimiser", "Geometry(problem).limit_map(x), with x that flows to it"),
    "rank": ("the rank of H", "problem.facts"),
}


class ClosedCurve(Protocol):
    """A closed curve of unit vectors: ``problem.facts.circle``, or a :class:`TracedCurve`."""

    def point(self, angle: Tensor) -> Tensor:
        """Return the unit vectors at angles: (...) -> (..., D)."""

    def angle(self, x: Tensor) -> Tensor:
        """Return the angles in (-pi, pi] of points: (..., D) -> (...)."""


def chart_of(curve: ClosedCurve) -> Callable[[Array], Array]:
    """Return the curve as a function of arrays, angles (n,) -> points (n, D)."""
    return lambda angles: np.asarray(curve.point(torch.from_numpy(angles)))


def known(problem: Problem, fact: str) -> Any:
    """Look up one of ``problem.facts``.

    Raises:
        ArgumentError: If it is not known.
    """
    value = getattr(problem.facts, fact, None)
    if value is None:
        what, remedy = _FACTS[fact]
        raise ArgumentError(
            f"{what} is not known of {problem.name!r}",
            received=f"no problem.facts.{fact}",
            expected=f"a problem with problem.facts.{fact}",
            remedy=remedy,
        )
    return value


def spherical_scale(problem: Problem) -> float:
    """Return the scale s of the noise of (18).

    Raises:
        ArgumentError: If the noise is another one.
    """
    if type(problem.noise) is not SphericalNoise:
        raise ArgumentError(
            f"the law of {problem.name!r} is known in closed form with the noise of (18) alone",
            received=f"its noise is {problem.noise!r}",
            expected="SphericalNoise",
            remedy="CircleDiffusion.of(problem) takes every noise with the two properties",
        )
    return problem.noise.scale


def require_constant_determinant(problem: Problem, points: Tensor) -> None:
    """Check that pdet H is the same at points (n, D) of Gamma_1.

    Raises:
        ArgumentError: If it varies, or is not known.
    """
    values = known(problem, "log_pseudo_determinant")(points)
    spread = float(values.max() - values.min())
    if not spread <= _CONSTANT:
        raise ArgumentError(
            f"the direction of {problem.name!r} has a drift along Gamma_1",
            received=f"log pdet H varies by {spread:.3g} along it",
            expected="constant pdet H",
            remedy="CircleDiffusion.of(problem), or ReversibleLaw.of(problem) for the equilibrium",
        )


def one_point(problem: Problem, x: Tensor, name: str) -> Tensor:
    """Check one point (D,) with values.

    Raises:
        ArgumentError, DTypeError: If it is none.
    """
    x = check_point(x, problem.dim, name=name, values=True)
    if x.dim() != 1:
        raise ArgumentError(
            f"{name} must be one point",
            received=f"{name} of shape {tuple(x.shape)}",
            expected=f"({problem.dim},)",
            remedy="one call for each point",
        )
    return x


def minimizer_or(problem: Problem, start: Tensor | None, seed: int = 0) -> Tensor:
    """A point of the manifold (D,) that is given, or that ``describe`` would name.

    Raises:
        ArgumentError, DTypeError: If it is no point, or no minimiser is found.
    """
    if start is None:
        return find_minimizer(Geometry(problem), seed)
    return one_point(problem, start, "start")


def kernel_basis(problem: Problem) -> Array:
    """Return an orthonormal basis of the kernel of H at the known minimiser, (d + 1, D)."""
    hessian = problem.hessian(known(problem, "minimizer")).numpy()
    basis: Array = np.linalg.eigh(hessian)[1][:, : problem.dim - known(problem, "rank")].T
    return basis


class KnownNorm:
    """The norm and the clock of a law of (13) with the noise of (18), the same on every path."""

    def norm(self: Any, T: float) -> float:
        """Compute the norm of Y(T), the same on every path."""
        return float(_LIMIT.norm(check_time("T", T), self.initial_norm, self.noise_trace))

    def clock(self: Any, T: float) -> float:
        """Compute the intrinsic clock u(T)."""
        return float(_LIMIT.clock(check_time("T", T), self.noise_trace, self.initial_norm))
