"""The law of the direction on a great sphere, with the noise of (18): spherical harmonics decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import eval_chebyt, eval_gegenbauer
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.noise import SphericalNoise
from manifold_sde.number_arrays import check_number
from manifold_sde.problem import Problem
from manifold_sde.time_scale import TimeScale

Array = NDArray[np.float64]

#: R is 1 throughout, and tau(t) = t: functions of steps are functions of the time T of (13).
_LIMIT = TimeScale(1.0, 0.5)
#: Largest spread of log pdet H and distance from the subspace that count as rounding.
_CONSTANT = 1e-8


@dataclass(frozen=True, eq=False)
class SphereLaw:
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
        start, tangent = np.asarray(self.start, float), np.asarray(self.tangent, float)
        good = start.ndim == 1 and tangent.ndim == 2 and tangent.shape[1:] == start.shape
        good = good and 2 <= len(tangent) < len(start)
        if good:
            good = bool(
                np.allclose(tangent @ tangent.T, np.eye(len(tangent)), atol=1e-9)
                and np.allclose(tangent.T @ (tangent @ start), start, atol=1e-9)
                and abs(np.linalg.norm(start) - 1.0) < 1e-9
            )
        numbers = (self.noise_scale, self.initial_norm)
        if not (good and all(math.isfinite(value) and value > 0 for value in numbers)):
            raise ArgumentError(
                "these do not describe a diffusion on a great sphere",
                received=f"start of shape {start.shape}, tangent of shape {tangent.shape}, "
                f"noise_scale={self.noise_scale!r}, initial_norm={self.initial_norm!r}",
                expected="a unit vector (D,) in the span of orthonormal rows (d + 1, D), d >= 1, "
                "and positive numbers",
                remedy="SphereLaw.of(problem) reads them off a problem",
            )
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "tangent", tangent)

    @classmethod
    def of(cls, problem: Problem, x0: Tensor | None = None) -> SphereLaw:
        """The law for a problem that knows its sphere.

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
        facts = problem.facts
        if facts is None or facts.limit_map is None or facts.log_pseudo_determinant is None:
            _refuse(problem, "Phi or log pdet H is not known")
        if type(problem.noise) is not SphericalNoise:
            _refuse(problem, f"its noise is {problem.noise!r}")
        points = facts.limit_map(fixed_directions(problem.dim))
        points = points / points.norm(dim=1, keepdim=True)
        hessian = problem.hessian(facts.minimizer).numpy()
        tangent = np.linalg.eigh(hessian)[1][:, : problem.dim - facts.rank].T
        outside = float(np.abs(points.numpy() - points.numpy() @ tangent.T @ tangent).max())
        values = facts.log_pseudo_determinant(points)
        spread = float(values.max() - values.min())
        if not (outside <= _CONSTANT and spread <= _CONSTANT):
            _refuse(
                problem,
                f"minimisers off a subspace by {outside:.2g}, log pdet H that varies by "
                f"{spread:.2g}",
            )
        x = problem.minimizer if x0 is None else check_point(x0, problem.dim, name="x0")
        if x.dim() != 1:
            raise ArgumentError(
                "the law is that of one start",
                received=f"x0 of shape {tuple(x.shape)}",
                expected=f"({problem.dim},)",
                remedy="one SphereLaw.of(problem, x) for each start",
            )
        y = facts.limit_map(x.detach().cpu().to(torch.float64)).numpy()
        norm = float(np.linalg.norm(y))
        return cls(y / norm, tangent, problem.noise.scale, norm)

    @property
    def dimension(self) -> int:
        """Dimension d of the sphere Gamma_1."""
        return len(self.tangent) - 1

    @property
    def noise_trace(self) -> float:
        """V = s^2 (D - 1), the trace of the noise covariance at norm 1."""
        return self.noise_scale**2 * (len(self.start) - 1)

    def norm(self, T: float) -> float:
        """Norm of Y(T), the same on every path."""
        return float(_LIMIT.norm(_time(T), self.initial_norm, self.noise_trace))

    def clock(self, T: float) -> float:
        """Intrinsic clock u(T)."""
        return float(_LIMIT.clock(_time(T), self.noise_trace, self.initial_norm))

    def rate(self, degree: int) -> float:
        """Rate l (l + d - 1) s^2 / 2 at which a harmonic of degree l decays, per unit of u."""
        return 0.5 * self.noise_scale**2 * degree * (degree + self.dimension - 1)

    def zonal(self, degree: int, cosine: ArrayLike) -> Array:
        """The zonal harmonic of a degree, with value 1 at its pole, at cosines to the pole (...).

        It is Legendre's polynomial for d = 2, and cos(l angle) for d = 1.
        """
        if self.dimension == 1:
            return np.asarray(eval_chebyt(degree, cosine))
        alpha = 0.5 * (self.dimension - 1)
        values = eval_gegenbauer(degree, alpha, cosine) / eval_gegenbauer(degree, alpha, 1.0)
        return np.asarray(values)

    def zonal_mean(self, degree: int, pole: ArrayLike, u: float) -> float:
        """Expectation at the clock u of the zonal harmonic of <pole, direction>.

        Args:
            degree: The degree l, 0 or more.
            pole: Unit vector (D,) of the sphere.
            u: The clock, 0 or more.

        Returns:
            The expectation.

        Raises:
            ArgumentError: If the pole is not on the sphere.
            TimeScaleError: If u is out of range.
        """
        pole = np.asarray(pole, dtype=np.float64)
        on_sphere = pole.shape == self.start.shape and np.allclose(
            self.tangent.T @ (self.tangent @ pole) / np.linalg.norm(pole), pole, atol=1e-9
        )
        if not on_sphere:
            raise ArgumentError(
                "the pole is not on the sphere",
                received=f"shape {pole.shape}, norm {np.linalg.norm(pole):.6g}",
                expected=f"a unit vector ({len(self.start)},) of Gamma_1",
                remedy="law.start, or a combination of the rows of law.tangent",
            )
        return self._decay(degree, u) * float(self.zonal(degree, pole @ self.start))

    def mean(self, u: float) -> Array:
        """Expectation of the direction at the clock u, (D,)."""
        return self._decay(1, u) * self.start

    def second_moment(self, u: float) -> Array:
        """Expectation of direction times its transpose at the clock u, (D, D)."""
        uniform = self.tangent.T @ self.tangent / len(self.tangent)
        moment: Array = uniform + self._decay(2, u) * (np.outer(self.start, self.start) - uniform)
        return moment

    def _decay(self, degree: int, u: float) -> float:
        return math.exp(-self.rate(degree) * check_number("u", u, "the diffusion starts at u = 0"))


def _time(T: float) -> float:
    return check_number("T", T, "the diffusion starts at T = 0")


def _refuse(problem: Problem, received: str) -> NoReturn:
    raise ArgumentError(
        f"the exact law on a great sphere is not that of {problem.name!r}",
        received=received,
        expected="minimisers in a subspace, constant pdet H there, and the noise of (18)",
        remedy="problems.great_sphere(dim)",
    )
