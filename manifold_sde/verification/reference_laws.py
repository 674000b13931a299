"""The exact laws of the reference set: means, densities, and tests of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import eval_legendre

from manifold_sde.problem import Problem
from manifold_sde.verification.exact import CircleDiffusion, CircleNormLaw, SphereLaw
from manifold_sde.verification.statistics import watson_test

Array = NDArray[np.float64]

#: Degrees of Legendre's series.
_DEGREES = 60


class Law(Protocol):
    """The exact law of an entry.

    Attributes:
        coordinate: What the density is of.
        ends: The interval of its values.
    """

    coordinate: str
    ends: tuple[float, float]

    def functions(self) -> Mapping[str, str]:
        """The functions of the state, and what they are."""

    def values(self, y: Array) -> dict[str, Array]:
        """The functions at states (n, D)."""

    def moments(self, T: float) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each function at a time."""

    def density(self, T: float, points: Array) -> Array:
        """Density of the coordinate at points (m,)."""

    def p_value(self, T: float, y: Array) -> float:
        """P-value of the hypothesis that the coordinate of states (n, D) has its law."""


class LawOnCircle:
    """The law where Gamma_1 is a circle: of the angle and the norm."""

    coordinate = "angle of the direction, from the start"
    ends = (-math.pi, math.pi)
    _FUNCTIONS: Mapping[str, tuple[str, Callable[[Any, Any], Any]]] = {
        "cos(angle)": ("first cosine of the angle", lambda a, r: np.cos(a) + 0.0 * r),
        "sin(angle)": ("first sine of the angle", lambda a, r: np.sin(a) + 0.0 * r),
        "cos(2 angle)": ("second cosine of the angle", lambda a, r: np.cos(2.0 * a) + 0.0 * r),
        "sin(2 angle)": ("second sine of the angle", lambda a, r: np.sin(2.0 * a) + 0.0 * r),
        "norm": ("|Y|", lambda a, r: 0.0 * a + r),
        "norm cos(angle)": ("|Y| times the first cosine", lambda a, r: r * np.cos(a)),
    }

    def __init__(self, problem: Problem, diffusion: CircleDiffusion) -> None:
        assert problem.facts is not None
        assert problem.facts.circle is not None
        self._circle, self._diffusion = problem.facts.circle, diffusion
        self._laws: dict[float, CircleNormLaw] = {}

    def functions(self) -> Mapping[str, str]:
        """The functions of the state, and what they are."""
        return {name: text for name, (text, _) in self._FUNCTIONS.items()}

    def _angles(self, y: Array) -> Array:
        return np.asarray(self._circle.angle(torch.from_numpy(y)))

    def values(self, y: Array) -> dict[str, Array]:
        """The functions at states (n, D)."""
        angles, norms = self._angles(y), np.linalg.norm(y, axis=1)
        return {name: f(angles, norms) for name, (_, f) in self._FUNCTIONS.items()}

    def at(self, T: float) -> CircleNormLaw:
        """The law at a time; paths start at the angle 0, with norm 1."""
        if T not in self._laws:
            self._laws[T] = self._diffusion.at(T)
        return self._laws[T]

    def moments(self, T: float) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each function at a time."""
        law, found = self.at(T), {}
        for name, (_, f) in self._FUNCTIONS.items():
            mean = law.expectation(f)
            variance = law.expectation(partial(_squared, f, mean))
            found[name] = mean, math.sqrt(max(variance, 0.0))
        return found

    def density(self, T: float, points: Array) -> Array:
        """Density of the coordinate at points (m,)."""
        return self.at(T).angle.density(points)

    def p_value(self, T: float, y: Array) -> float:
        """P-value of the law of the coordinate of states (n, D)."""
        return float(watson_test(self._angles(y), self.at(T).angle.cdf).p_value)


def _squared(f: Callable[[Any, Any], Any], mean: float, angle: Any, norm: Any) -> Any:
    return (f(angle, norm) - mean) ** 2


class LawOnSphere:
    """The law where Gamma_1 is a great 2-sphere: of the angle to the start."""

    coordinate = "cosine of the angle between the direction and the start"
    ends = (-1.0, 1.0)

    def __init__(self, law: SphereLaw) -> None:
        self._law = law
        self._other = next(row for row in law.tangent if abs(row @ law.start) < 1e-9)

    def functions(self) -> Mapping[str, str]:
        """The functions of the state, and what they are."""
        return {
            "cosine": "cosine to the start",
            "P2(cosine)": "second Legendre polynomial of it",
            "sideways": f"component of the direction along {self._other.round(12).tolist()}",
            "norm": "|Y|",
        }

    def values(self, y: Array) -> dict[str, Array]:
        """The functions at states (n, D)."""
        norm = np.linalg.norm(y, axis=1)
        u = y / norm[:, None]
        cosine = u @ self._law.start
        found = (cosine, eval_legendre(2, cosine), u @ self._other, norm)
        return dict(zip(self.functions(), found, strict=True))

    def _zonal(self, T: float) -> Array:
        """Means of Legendre's polynomials of the cosine, (_DEGREES,)."""
        u, start = self._law.clock(T), self._law.start
        return np.array([self._law.zonal_mean(k, start, u) for k in range(_DEGREES)])

    def moments(self, T: float) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each function at a time."""
        p = self._zonal(T)
        square = (1.0 + 2.0 * p[2]) / 3.0
        # P_2^2 = 1/5 + 2/7 P_2 + 18/35 P_4.
        second = 0.2 + 2.0 / 7.0 * p[2] + 18.0 / 35.0 * p[4]
        return {
            "cosine": (p[1], math.sqrt(square - p[1] ** 2)),
            "P2(cosine)": (p[2], math.sqrt(second - p[2] ** 2)),
            "sideways": (0.0, math.sqrt(0.5 * (1.0 - square))),
            "norm": (self._law.norm(T), 0.0),
        }

    def density(self, T: float, points: Array) -> Array:
        """Density of the coordinate at points (m,)."""
        k = np.arange(_DEGREES)
        found: Array = ((k + 0.5) * self._zonal(T) * eval_legendre(k, points[:, None])).sum(1)
        return found

    def _cdf(self, T: float, points: Array) -> Array:
        # The integral of (2k + 1) P_k is P_{k+1} - P_{k-1}.
        k, p = np.arange(1, _DEGREES), self._zonal(T)
        waves = eval_legendre(k + 1, points[:, None]) - eval_legendre(k - 1, points[:, None])
        return np.clip(0.5 * (1.0 + points) + 0.5 * (p[1:] * waves).sum(1), 0.0, 1.0)

    def p_value(self, T: float, y: Array) -> float:
        """P-value of the law of the coordinate of states (n, D)."""
        cosine = self.values(y)["cosine"]
        return float(stats.kstest(cosine, lambda c: self._cdf(T, np.asarray(c))).pvalue)
