"""Laws on a circle, and on a circle beside a norm, by the weights of nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import LARGEST_FLOAT, as_float64, check_number
from manifold_sde.verification.exact.inputs import check_order, check_turn, keep, values_at
from manifold_sde.verification.exact.spectral import Array, fourier_nodes

#: Fourier moments beyond the last node are taken to be 0: the density is refused where the last
#: ones are above this.
_RESOLVED = 1e-6


@dataclass(frozen=True, eq=False)
class PeriodicLaw:
    r"""A law on the angles modulo a turn, given by its first Fourier moments.

    The weights w_j of the n equally spaced angles are those for which sum_j w_j f(theta_j) is the
    expectation of every trigonometric polynomial f of degree (n - 1) / 2. For other
    functions the error is what the nodes do not resolve; weights can be negative.

    Args:
        weights: The weights (n,) of the angles 2 pi j / n, with n odd.

    Raises:
        ArgumentError: If they are not an odd number of finite weights.

    Example:
        >>> import numpy as np
        >>> law = PeriodicLaw(np.full(9, 1 / 9))
        >>> round(law.expectation(lambda theta: np.cos(theta) ** 2), 12)
        0.5
    """

    weights: Array

    def __post_init__(self) -> None:
        weights = as_float64("weights", self.weights)
        if not (weights.ndim == 1 and len(weights) % 2 and np.isfinite(weights).all()):
            raise ArgumentError(
                "these are not the weights of equally spaced angles",
                received=f"shape {weights.shape}, finite: {bool(np.isfinite(weights).all())}",
                expected="an odd number of finite weights, (n,)",
                remedy="np.full(9, 1 / 9) is the uniform law",
            )
        keep(self, weights=weights)

    @property
    def angles(self) -> Array:
        """The nodes (n,), in [0, 2 pi)."""
        return fourier_nodes(len(self.weights))

    def expectation(self, f: Callable[[Array], Array]) -> float:
        """Compute E f(angle) for a periodic function f of an array of angles."""
        return float(self.weights @ values_at("function", f, self.weights.shape, self.angles))

    def moment(self, order: int) -> complex:
        """Compute the moment E exp(i k angle), which is 0 beyond the degree of the weights."""
        order = check_order(order)
        if abs(order) > len(self.weights) // 2:
            return 0j
        return complex(self.weights @ np.exp(1j * order * self.angles))

    @property
    def tail(self) -> float:
        """The error of the density: the largest of the last eighth of the Fourier moments."""
        moments = np.abs(np.fft.rfft(self.weights))
        return float(moments[-max(2, len(moments) // 8) :].max())

    def density(self, angle: ArrayLike) -> Array:
        """Compute the density with respect to d(angle), at any angles (...).

        Raises:
            ArgumentError: If the law is too narrow for its number of nodes.
        """
        moments, angle = self._moments(), as_float64("angle", angle)
        terms = moments[1:] * np.exp(-1j * angle[..., None] * np.arange(1, len(moments)))
        density: Array = (1.0 + 2.0 * terms.sum(-1).real) / (2.0 * math.pi)
        return density

    def cdf(self, angle: ArrayLike) -> Array:
        """Compute the probability of (-pi, angle], for angles (...) in [-pi, pi].

        Raises:
            ArgumentError: If an angle is outside, or the law too narrow for its nodes.
        """
        angle = check_turn(angle)
        moments = self._moments()
        modes = np.arange(1, len(moments))
        waves = np.exp(-1j * angle[..., None] * modes) - np.exp(1j * math.pi * modes)
        terms = (moments[1:] * waves / (-1j * modes)).sum(-1).real
        return np.clip((angle + math.pi + 2.0 * terms) / (2.0 * math.pi), 0.0, 1.0)

    def total_variation(self, other: PeriodicLaw) -> float:
        """Compute the total variation distance, half the L^1 distance of the densities.

        Raises:
            ArgumentError: If one of the laws is too narrow for its nodes.
        """
        fine = fourier_nodes(4096)
        return float(math.pi * np.abs(self.density(fine) - other.density(fine)).mean())

    def _moments(self) -> NDArray[np.complex128]:
        """Return E exp(i k angle) for k = 0, 1, ..."""
        if not self.tail <= _RESOLVED:
            raise ArgumentError(
                "the law is too narrow for its nodes to show a density",
                received=f"Fourier moments of {self.tail:.2g} at degree {len(self.weights) // 2}",
                expected=f"at most {_RESOLVED:g}",
                remedy="a later time, or nodes=129; expectations need no density",
            )
        return np.fft.rfft(self.weights).conj()


@dataclass(frozen=True, eq=False)
class CircleNormLaw:
    """The joint law of an angle and of the norm, by the weights of their nodes.

    Args:
        weights: Weights (n, m) of n equally spaced angles and m norms.
        norms: The norms (m,).
    """

    weights: Array
    norms: Array

    @property
    def angles(self) -> Array:
        """The nodes (n,) of the angle, in [0, 2 pi)."""
        return fourier_nodes(len(self.weights))

    def expectation(self, f: Callable[[Array, Array], Array]) -> float:
        """Compute E f(angle, norm) for a smooth function of two arrays that broadcast."""
        values = values_at("function", f, self.weights.shape, self.angles[:, None], self.norms)
        return float((self.weights * values).sum())

    @property
    def angle(self) -> PeriodicLaw:
        """The law of the angle alone."""
        return PeriodicLaw(self.weights.sum(1))

    def norm_moment(self, order: float) -> float:
        """Compute E ||Y||^order."""
        power = check_number("order", order, "norm_moment(2.0)", least=-LARGEST_FLOAT)
        return float(self.weights.sum(0) @ self.norms**power)
