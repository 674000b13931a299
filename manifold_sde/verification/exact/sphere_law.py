"""The law of the direction on a great sphere, with the noise of (18): spherical harmonics decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import eval_chebyt, eval_gegenbauer
from torch import Tensor

from manifold_sde.arguments import check_integer, real
from manifold_sde.errors import ArgumentError
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.number_arrays import as_float64
from manifold_sde.problem import Problem, require_problem
from manifold_sde.verification.exact.facts import (
    KnownNorm,
    kernel_basis,
    known,
    one_point,
    require_constant_determinant,
    spherical_scale,
)
from manifold_sde.verification.exact.inputs import check_time, keep
from manifold_sde.verification.exact.spectral import Array

#: Largest distance from the subspace that counts as rounding.
_IN_SUBSPACE = 1e-8
#: Highest degree of a harmonic: the time of its recurrence is proportional to it.
_HIGHEST = 10**5


@dataclass(frozen=True, eq=False)
class SphereLaw(KnownNorm):
    r"""The exact law of (13) where Gamma_1 is a great sphere, with the noise of (18).

    If Gamma is a linear subspace without the origin and pdet H is constant on the sphere Gamma_1,
    of dimension d, then the direction in the clock u is a Brownian motion of variance s^2 on it.
    Its generator s^2 Delta / 2 has the spherical harmonics as eigenfunctions,

    .. math::

        E\, Y_l(\bar Y(u)) = e^{-l (l + d - 1) s^2 u / 2}\, Y_l(\bar Y(0)),

    the norm is not random, and the equilibrium is uniform.

    Args:
        start: The direction at the start, a unit vector (D,).
        tangent: Orthonormal basis of Gamma as rows, (d + 1, D).
        noise_scale: The scale s of (18).
        initial_norm: The norm at the start.

    Raises:
        ArgumentError: If these do not describe such a diffusion.

    Example:
        >>> from manifold_sde import problems
        >>> law = SphereLaw.of(problems.great_sphere())
        >>> law.dimension, round(law.rate(1), 4), law.mean(law.clock(1.0)).round(4)
        (2, 0.09, array([0.8461, 0.    , 0.    , 0.    ]))

    Source: equations (13) and (18).
    """

    start: Array
    tangent: Array
    noise_scale: float
    initial_norm: float = 1.0

    def __post_init__(self) -> None:
        start, tangent = as_float64("start", self.start), as_float64("tangent", self.tangent)
        good = start.ndim == 1 and tangent.ndim == 2 and tangent.shape[1:] == start.shape
        good = good and 2 <= len(tangent) < len(start)
        if good:
            good = bool(
                np.allclose(tangent @ tangent.T, np.eye(len(tangent)), atol=1e-9)
                and np.allclose(tangent.T @ (tangent @ start), start, atol=1e-9)
                and abs(np.linalg.norm(start) - 1.0) < 1e-9
            )
        numbers = (real(self.noise_scale), real(self.initial_norm))
        if not (good and all(math.isfinite(value) and value > 0 for value in numbers)):
            raise ArgumentError(
                "these do not describe a diffusion on a great sphere",
                received=f"start of shape {start.shape}, tangent of shape {tangent.shape}, "
                f"noise_scale={self.noise_scale!r}, initial_norm={self.initial_norm!r}",
                expected="a unit vector (D,) in the span of orthonormal rows (d + 1, D), d >= 1, "
                "and positive numbers",
                remedy="SphereLaw.of(problem) reads them off a problem",
            )
        keep(self, start=start, tangent=tangent, noise_scale=numbers[0], initial_norm=numbers[1])

    @classmethod
    def of(cls, problem: Problem, x0: Tensor | None = None) -> SphereLaw:
        """Read the law off a problem that knows its sphere.

        Args:
            problem: A problem with ``facts``, the noise of (18), a linear Gamma and constant
                pdet H, which are measured at fixed points.
            x0: Start (D,) of SGD; by default the problem's minimiser. The diffusion starts at
                Phi(x0).

        Returns:
            The law.

        Raises:
            ArgumentError: If the law of this problem is another one, or not known.
        """
        phi = known(require_problem(problem), "limit_map")
        scale = spherical_scale(problem)
        points = phi(fixed_directions(problem.dim))
        points = points / points.norm(dim=1, keepdim=True)
        tangent = kernel_basis(problem)
        outside = float(np.abs(points.numpy() - points.numpy() @ tangent.T @ tangent).max())
        if not outside <= _IN_SUBSPACE:
            raise ArgumentError(
                f"the minimisers of {problem.name!r} of unit norm are not a great sphere",
                received=f"minimisers off a subspace by {outside:.2g}",
                expected="minimisers in a subspace",
                remedy="law_of(problem) finds the law of a curve",
            )
        require_constant_determinant(problem, points)
        x = problem.minimizer if x0 is None else one_point(problem, x0, "x0")
        y = phi(x.detach().cpu().to(torch.float64)).numpy()
        norm = float(np.linalg.norm(y))
        return cls(y / norm, tangent, scale, norm)

    @property
    def dimension(self) -> int:
        """Dimension d of the sphere Gamma_1."""
        return len(self.tangent) - 1

    @property
    def noise_trace(self) -> float:
        """V = s^2 (D - 1), the trace of the noise covariance at norm 1."""
        return self.noise_scale**2 * (len(self.start) - 1)

    def rate(self, degree: int) -> float:
        """Compute the rate l (l + d - 1) s^2 / 2 at which a harmonic of degree l decays in u."""
        degree = _check_degree(degree)
        return 0.5 * self.noise_scale**2 * degree * (degree + self.dimension - 1)

    def zonal(self, degree: int, cosine: ArrayLike) -> Array:
        """Evaluate the zonal harmonic of value 1 at its pole, at cosines to the pole (...).

        It is Legendre's polynomial for d = 2, and cos(l angle) for d = 1.

        Raises:
            ArgumentError: If the degree is out of range, or too high for the dimension.
        """
        degree, cosine = _check_degree(degree), as_float64("cosine", cosine)
        if self.dimension == 1:
            return np.asarray(eval_chebyt(degree, cosine))
        alpha = 0.5 * (self.dimension - 1)
        at_pole = float(eval_gegenbauer(degree, alpha, 1.0))
        if not math.isfinite(at_pole):
            raise ArgumentError(
                "the harmonic is too large for a float",
                received=f"degree={degree} on a sphere of dimension {self.dimension}",
                expected="a finite Gegenbauer polynomial at 1",
                remedy="a lower degree; the harmonics of high ones decay at once",
            )
        return np.asarray(eval_gegenbauer(degree, alpha, cosine) / at_pole)

    def zonal_mean(self, degree: int, pole: ArrayLike, u: float) -> float:
        """Compute the expectation at the clock u of the zonal harmonic of <pole, direction>.

        Args:
            degree: The degree l, 0 or more.
            pole: Unit vector (D,) of the sphere.
            u: The clock, 0 or more.

        Returns:
            The expectation.

        Raises:
            ArgumentError: If the pole is not on the sphere, or the degree out of range.
            TimeScaleError: If u is out of range.
        """
        pole = as_float64("pole", pole)
        size = float(np.linalg.norm(pole))
        on_sphere = pole.shape == self.start.shape and 0 < size < math.inf
        on_sphere = on_sphere and np.allclose(
            self.tangent.T @ (self.tangent @ pole) / size, pole, atol=1e-9
        )
        if not on_sphere:
            raise ArgumentError(
                "the pole is not on the sphere",
                received=f"shape {pole.shape}, norm {size:.6g}",
                expected=f"a unit vector ({len(self.start)},) of Gamma_1",
                remedy="law.start, or a combination of the rows of law.tangent",
            )
        return self._decay(degree, u) * float(self.zonal(degree, pole @ self.start))

    def mean(self, u: float) -> Array:
        """Compute the expectation of the direction at the clock u, (D,)."""
        return self._decay(1, u) * self.start

    def second_moment(self, u: float) -> Array:
        """Compute the second moment of the direction at the clock u, (D, D)."""
        uniform = self.tangent.T @ self.tangent / len(self.tangent)
        moment: Array = uniform + self._decay(2, u) * (np.outer(self.start, self.start) - uniform)
        return moment

    def _decay(self, degree: int, u: float) -> float:
        return math.exp(-self.rate(degree) * check_time("u", u))


def _check_degree(degree: object) -> int:
    return check_integer("degree", degree, 0, _HIGHEST)
