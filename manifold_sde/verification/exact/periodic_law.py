"""Laws on a circle, and on a circle beside a norm, by the weights of nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from manifold_sde.errors import ArgumentError
from manifold_sde.verification.exact.spectral import fourier_nodes

Array = NDArray[np.float64]

#: Fourier moments beyond the last node are taken to be 0: the density is refused where the last
#: ones are above this.
_RESOLVED = 1e-6


@dataclass(frozen=True, eq=False)
class PeriodicLaw:
    r"""A law on the angles modulo a turn, given by its first Fourier moments.

    The weights w_j of the n equally spaced angles are those for which sum_j w_j f(theta_j) is the
    expectation of every trigonometric polynomial f of degree (n - 1) / 2. Other functions have it
    up to what of them the nodes do not resolve; weights can be negative.

    Args:
        weights: The weights (n,) of the angles 2 pi j / n, with n odd.

    Example:
        >>> import numpy as np
        >>> law = PeriodicLaw(np.full(9, 1 / 9))
        >>> round(law.expectation(lambda theta: np.cos(theta) ** 2), 12)
        0.5
    """

    weights: Array

    @property
    def angles(self) -> Array:
        """The nodes (n,), in [0, 2 pi)."""
        return fourier_nodes(len(self.weights))

    def expectation(self, f: Callable[[Array], Array]) -> float:
        """E f(angle), for a periodic function f of an array of angles."""
        return float(self.weights @ _values(f(self.angles), self.weights.shape))

    def moment(self, order: int) -> complex:
        """Fourier moment E exp(i k angle); 0 beyond the degree that the weights hold."""
        if abs(order) > len(self.weights) // 2:
            return 0j
        return complex(self.weights @ np.exp(1j * order * self.angles))

    @property
    def tail(self) -> float:
        """The largest of the last eighth of the Fourier moments: the error of the density."""
        moments = np.abs(np.fft.rfft(self.weights))
        return float(moments[-max(2, len(moments) // 8) :].max())

    def density(self, angle: ArrayLike) -> Array:
        """Density with respect to d(angle), at any angles (...).

        Raises:
            ArgumentError: If the law is too narrow for its number of nodes.
        """
        moments = self._moments()
        angle = np.asarray(angle, dtype=np.float64)
        terms = moments[1:] * np.exp(-1j * angle[..., None] * np.arange(1, len(moments)))
        density: Array = (1.0 + 2.0 * terms.sum(-1).real) / (2.0 * math.pi)
        return density

    def cdf(self, angle: ArrayLike) -> Array:
        """Probability of (-pi, angle], for angles (...) in [-pi, pi].

        Raises:
            ArgumentError: If an angle is outside, or the law too narrow for its nodes.
        """
        angle = np.asarray(angle, dtype=np.float64)
        if not bool(np.all(np.abs(angle) <= math.pi)):
            raise ArgumentError(
                "the distribution function starts at -pi and ends at pi",
                received=f"angles from {np.min(angle):g} to {np.max(angle):g}",
                expected="angles in [-pi, pi]",
                remedy="wrap(angle) takes whole turns off",
            )
        moments = self._moments()
        modes = np.arange(1, len(moments))
        waves = np.exp(-1j * angle[..., None] * modes) - np.exp(1j * math.pi * modes)
        terms = (moments[1:] * waves / (-1j * modes)).sum(-1).real
        return np.clip((angle + math.pi + 2.0 * terms) / (2.0 * math.pi), 0.0, 1.0)

    def total_variation(self, other: PeriodicLaw) -> float:
        """Total variation distance to another law, half the integral of the densities' difference.

        Raises:
            ArgumentError: If one of the laws is too narrow for its nodes.
        """
        fine = fourier_nodes(4096)
        return float(math.pi * np.abs(self.density(fine) - other.density(fine)).mean())

    def _moments(self) -> NDArray[np.complex128]:
        """E exp(i k angle) for k = 0, 1, ..."""
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
        """E f(angle, norm), for a smooth function of two arrays that broadcast."""
        values = f(self.angles[:, None], self.norms)
        return float((self.weights * _values(values, self.weights.shape)).sum())

    @property
    def angle(self) -> PeriodicLaw:
        """The law of the angle alone."""
        return PeriodicLaw(self.weights.sum(1))

    def norm_moment(self, order: float) -> float:
        """E ||Y||^order."""
        return float(self.weights.sum(0) @ self.norms**order)


def _values(values: ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ArgumentError(
            "the function does not return one number for each point",
            received=f"values of shape {array.shape}",
            expected=f"an array that broadcasts to {shape}",
            remedy="write it with NumPy functions of whole arrays",
        ) from None
