"""The law of a normal angle modulo a turn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from manifold_sde.arguments import check_integer, real
from manifold_sde.errors import ArgumentError
from manifold_sde.number_arrays import LARGEST_STEP, as_float64
from manifold_sde.verification.exact.inputs import check_order, check_turn, keep
from manifold_sde.verification.exact.spectral import Array

_TURN = 2.0 * math.pi
#: Largest variance for which the images are summed, not the Fourier series: each is right to
#: rounding on its side with this number of terms.
_CROSSOVER = 4.0
_IMAGES = np.arange(-5.0, 6.0)
_MODES = np.arange(1.0, 7.0)


def wrap(angle: ArrayLike) -> Array:
    """Reduce angles modulo a turn to [-pi, pi).

    >>> from math import pi
    >>> wrap([0.5, 0.5 + 2 * pi, pi])
    array([ 0.5       ,  0.5       , -3.14159265])
    """
    away: Any = as_float64("angle", angle) + math.pi
    return away % _TURN - math.pi


@dataclass(frozen=True)
class WrappedNormal:
    r"""The law on the circle of an angle whose unwrapped value is N(mean, variance).

    Its density with respect to d(angle) is the theta function

    .. math::

        p(\theta) = \frac1{2\pi} \Bigl(1 + 2 \sum_{k \ge 1} e^{-k^2 v / 2} \cos k(\theta - m)\Bigr)
        = \sum_j \frac{1}{\sqrt{2\pi v}} e^{-(\theta - m + 2\pi j)^2 / 2v} .

    Args:
        mean: The mean m, in radians; any real number.
        variance: The variance v of the unwrapped angle; 0 is a point mass.

    Raises:
        ArgumentError: If the mean is not finite, or the variance is negative or not finite.

    Example:
        >>> law = WrappedNormal(0.0, 1.0)
        >>> round(float(law.density(0.0)), 6), round(law.moment(1).real, 6)
        (0.398942, 0.606531)
    """

    mean: float
    variance: float

    def __post_init__(self) -> None:
        mean, variance = real(self.mean), real(self.variance)
        if not (math.isfinite(mean) and 0 <= variance < math.inf):
            raise ArgumentError(
                "these are not the mean and variance of an angle",
                received=f"mean={self.mean!r}, variance={self.variance!r}",
                expected="a finite mean, and a finite variance of at least 0",
                remedy="check the time and the radius that they come from",
            )
        keep(self, mean=mean, variance=variance)

    def density(self, angle: ArrayLike) -> Array:
        """Compute the density with respect to d(angle), at any angles (...).

        Raises:
            ArgumentError: If the variance is 0: a point mass has no density.
        """
        if self.variance == 0.0:
            raise ArgumentError(
                "a point mass has no density",
                received="variance 0, the law at the start",
                expected="a positive variance",
                remedy="use cdf, or a time after the start",
            )
        away = wrap(as_float64("angle", angle) - self.mean)[..., None]
        if self.variance <= _CROSSOVER:
            exponents = -((away + _TURN * _IMAGES) ** 2) / (2.0 * self.variance)
            return np.exp(exponents).sum(-1) / math.sqrt(_TURN * self.variance)
        terms = self._decay(_MODES) * np.cos(_MODES * away)
        return (1.0 + 2.0 * terms.sum(-1)) / _TURN

    def cdf(self, angle: ArrayLike) -> Array:
        """Compute the probability of (-pi, angle], for angles (...) in [-pi, pi].

        Raises:
            ArgumentError: If an angle is outside [-pi, pi].
        """
        angle = check_turn(angle)
        mean = float(wrap(self.mean))
        if self.variance == 0.0:
            return np.where(angle >= mean, 1.0, 0.0)
        if self.variance <= _CROSSOVER:
            spread = math.sqrt(self.variance)
            shift = _TURN * _IMAGES - mean
            upper = ndtr((angle[..., None] + shift) / spread)
            return np.clip((upper - ndtr((shift - math.pi) / spread)).sum(-1), 0.0, 1.0)
        start = np.sin(_MODES * (-math.pi - mean))
        terms = self._decay(_MODES) / _MODES * (np.sin(_MODES * (angle[..., None] - mean)) - start)
        return np.clip((angle + math.pi + 2.0 * terms.sum(-1)) / _TURN, 0.0, 1.0)

    def moment(self, order: int) -> complex:
        """Compute E exp(i k angle) = exp(-k^2 variance / 2) exp(i k mean)."""
        order = check_order(order)
        return complex(np.exp(1j * order * self.mean) * self._decay(float(order)))

    def sample(self, size: int | tuple[int, ...], seed: int | np.random.Generator) -> Array:
        """Draw independent unwrapped angles.

        Args:
            size: Shape of the result.
            seed: Seed in [0, 2^64), or a generator to draw from.

        Returns:
            Array of the shape; :func:`wrap` puts it on the circle.

        Raises:
            ArgumentError: If the shape or the seed is out of range.
        """
        lengths = size if isinstance(size, (tuple, list)) else (size,)
        shape = tuple(check_integer("size", length, 0, LARGEST_STEP) for length in lengths)
        if not isinstance(seed, np.random.Generator):
            seed = np.random.default_rng(check_integer("seed", seed, 0, 2**64 - 1))
        return self.mean + math.sqrt(self.variance) * seed.standard_normal(shape)

    def _decay(self, order: Any) -> Any:
        return np.exp(-0.5 * self.variance * np.square(order))
