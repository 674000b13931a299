"""Samples of (angle, norm) against exact laws and against each other, with declared error rates.

Eight expectations are compared: the first two Fourier modes of the angle, the logarithm of the norm
and its square, and the products of the logarithm with the first mode. The false-alarm rate is
LEVEL for all eight together (Bonferroni); a shift of one of them by ``resolution`` is found with
probability of at least 99 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from manifold_sde import Problem
from manifold_sde.verification.exact import CircleNormLaw

Array = np.ndarray

LEVEL = 1e-4
NAMES = ("cos", "sin", "cos 2", "sin 2", "log", "log^2", "log cos", "log sin")


@dataclass(frozen=True)
class Comparison:
    """Eight means against what they should be.

    Attributes:
        deviation: The differences (8,).
        error: Their standard errors (8,).
        freedom: Degrees of freedom.
    """

    deviation: Array
    error: Array
    freedom: float

    @property
    def threshold(self) -> float:
        """The number of standard errors that is exceeded with probability LEVEL."""
        return float(stats.t.isf(LEVEL / (2 * len(self.deviation)), self.freedom))

    @property
    def scores(self) -> Array:
        """Deviations in standard errors."""
        return self.deviation / self.error

    @property
    def agrees(self) -> bool:
        """Whether none is beyond the threshold."""
        return bool(np.abs(self.scores).max() <= self.threshold)

    @property
    def resolution(self) -> Array:
        """Shifts (8,) of which 99 % are found."""
        return (self.threshold + stats.norm.isf(0.01)) * self.error

    def __str__(self) -> str:
        pairs = zip(NAMES, self.deviation, self.scores, strict=True)
        return ", ".join(f"{name}: {value:.2g} ({score:.1f})" for name, value, score in pairs)


def features(angle: Array, norm: Array) -> Array:
    """The eight functions at angles and norms that broadcast: (..., 8)."""
    angle, size = np.broadcast_arrays(angle, np.log(norm))
    cos, sin = np.cos(angle), np.sin(angle)
    columns = [cos, sin, np.cos(2 * angle), np.sin(2 * angle), size, size**2, size * cos]
    return np.stack([*columns, size * sin], -1)


def values(problem: Problem, states: Tensor, scale: float, *, pairs: bool = False) -> Array:
    """The eight functions of states (n, D) near the circle, their norms in units of a scale.

    Args:
        problem: The problem, which knows its circle.
        states: States (n, D); of SGD, Phi of the weights.
        scale: The unit of the norms.
        pairs: Whether states 2i and 2i + 1 come from antithetic paths: their means are taken.
    """
    angle = problem.facts.circle.angle(states).numpy()
    found = features(angle, (states.norm(dim=-1) / scale).numpy())
    return found.reshape(-1, 2, found.shape[-1]).mean(1) if pairs else found


def scale_of(law: CircleNormLaw) -> float:
    """A norm in the middle of the law."""
    return float(law.norms.mean())


def expected(law: CircleNormLaw) -> Array:
    """The eight expectations under a law, the norms in units of its scale."""
    found = features(law.angles[:, None], law.norms[None] / scale_of(law))
    return np.einsum("am,amf->f", law.weights, found)


def against(sample: Array, want: Array) -> Comparison:
    """A sample (n, 8) against expectations (8,)."""
    n = len(sample)
    error = sample.std(0, ddof=1) / n**0.5
    return Comparison(sample.mean(0) - want, error, n - 1)


def against_sample(sample: Array, other: Array) -> Comparison:
    """Two independent samples (n, 8), (k, 8)."""
    variances = [s.var(0, ddof=1) / len(s) for s in (sample, other)]
    error = np.sqrt(sum(variances))
    return Comparison(sample.mean(0) - other.mean(0), error, min(len(sample), len(other)) - 1)
