r"""Tests of samples against exact laws, with error rates that are declared and can be checked.

A test returns a p-value that is uniform under its hypothesis, so that rejecting below alpha raises
a false alarm with probability alpha; :func:`detectable_variance_ratio` says what a sample of a
given size can miss. Values are to be independent: one number a run, not many times of one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from manifold_sde.errors import ArgumentError
from manifold_sde.verification.exact.wrapped_normal import wrap

Array = NDArray[np.float64]

_FEWEST = 8
_GRID = 4096


@dataclass(frozen=True)
class TestResult:
    """Outcome of a test.

    Attributes:
        statistic: The statistic; large values speak against the hypothesis. A number, or one for
            each sample of a batch.
        p_value: Probability under the hypothesis of a statistic at least as extreme.
    """

    __test__ = False  # not a test case of pytest

    statistic: Any
    p_value: Any


@dataclass(frozen=True)
class VarianceRatio:
    """Variance of a sample divided by the one that is predicted.

    Attributes:
        value: The ratio.
        standard_error: Its standard error, from the sample's own fourth moment. It is too small
            where the sample has heavy tails that it hardly reached.
        p_value: Two-sided, of the exact chi-squared test that the values are normal with the
            variance predicted.
        kurtosis: Fourth central moment over the squared variance: 3 for a normal law.
    """

    value: float
    standard_error: float
    p_value: float
    kurtosis: float


def watson_test(angles: ArrayLike, cdf: Callable[[Array], Array]) -> TestResult:
    r"""Watson's U^2: do angles have this law on the circle?

    With the order statistics of F(angle),

    .. math::

        U^2 = \sum_i \Bigl(u_{(i)} - \frac{2i - 1}{2n}\Bigr)^2 + \frac1{12n}
              - n \bigl(\bar u - \tfrac12\bigr)^2,

    which is Cramer and von Mises' statistic made independent of where the circle is cut. The
    p-value is Watson's series with Stephens' correction for finite n; below n = 40 it is right only
    where it is small, below 0.1.

    Args:
        angles: Independent angles (..., n), n of at least 8; whole turns do not matter.
        cdf: The law's distribution function, F(angle) = P((-pi, angle]), continuous.

    Returns:
        Statistic (corrected for n) and p-value, each a number, or of shape (...).

    Raises:
        ArgumentError: If there are too few angles, or values that are not finite.

    Example:
        >>> from manifold_sde.verification.exact import WrappedNormal
        >>> law = WrappedNormal(mean=3.0, variance=0.5)
        >>> angles = law.sample(200, seed=0)
        >>> watson_test(angles, law.cdf).p_value > 0.01
        True
        >>> watson_test(2.0 * angles - 3.0, law.cdf).p_value < 1e-4
        True

    References:
        Watson, Goodness-of-fit tests on a circle, Biometrika 48 (1961); Stephens, Use of the
        Kolmogorov-Smirnov, Cramer-von Mises and related statistics, J. R. Stat. Soc. B 32 (1970).
    """
    values = np.sort(cdf(wrap(_sample(angles, "angles"))), axis=-1)
    n = values.shape[-1]
    middles = (np.arange(n) + 0.5) / n
    mises = ((values - middles) ** 2).sum(-1) + 1.0 / (12 * n)
    watson = mises - n * (values.mean(-1) - 0.5) ** 2
    corrected = (watson - 0.1 / n + 0.1 / n**2) * (1.0 + 0.8 / n)
    return TestResult(_plain(corrected), _plain(_watson_tail(corrected)))


def _watson_tail(statistic: Array) -> Array:
    """P(U^2 > x) = 2 sum over m of (-1)^(m-1) exp(-2 m^2 pi^2 x), for large n."""
    m = np.arange(1.0, 41.0)
    signs = np.where(m % 2 == 1, 2.0, -2.0)
    # Below 0.015 the tail is 1 to three digits, and the series converges slowly.
    safe = np.maximum(np.asarray(statistic), 0.015)[..., None]
    return np.clip((signs * np.exp(-2.0 * (math.pi * m) ** 2 * safe)).sum(-1), 0.0, 1.0)


def variance_ratio(values: ArrayLike, variance: float) -> VarianceRatio:
    """Variance of a sample against the variance of the normal law that is predicted.

    Args:
        values: Independent values (n,), n of at least 8.
        variance: The variance predicted, positive.

    Returns:
        The ratio, its standard error, p-value and the sample's kurtosis.

    Raises:
        ArgumentError: If the sample cannot be used, or the variance is not positive.

    Example:
        >>> sample = np.random.default_rng(0).normal(scale=2.0, size=400)
        >>> ratio = variance_ratio(sample, 1.0)
        >>> 3.0 < ratio.value < 5.0, ratio.p_value < 1e-10
        (True, True)
    """
    sample = _sample(values, "values")
    if sample.ndim != 1:
        raise ArgumentError(
            "the variance is that of one sample",
            received=f"values of shape {sample.shape}",
            expected="(n,)",
            remedy="take the rows one by one",
        )
    if not (math.isfinite(variance) and variance > 0):
        raise ArgumentError(
            "the variance predicted is out of range",
            received=repr(variance),
            expected="a positive finite number",
            remedy="ask for a time after the start",
        )
    n = len(sample)
    value = float(sample.var(ddof=1)) / variance
    kurtosis = float(stats.kurtosis(sample, fisher=False)) if value > 0 else math.nan
    error = value * math.sqrt(max(kurtosis - (n - 3) / (n - 1), 0.0) / n) if value > 0 else 0.0
    statistic = (n - 1) * value
    tails = (stats.chi2.sf(statistic, n - 1), stats.chi2.cdf(statistic, n - 1))
    p_value = 2.0 * float(min(tails))
    return VarianceRatio(value, error, min(p_value, 1.0), kurtosis)


def detectable_variance_ratio(n: int, false_alarm: float, miss: float) -> tuple[float, float]:
    """What the test of :func:`variance_ratio` finds in n normal values.

    Args:
        n: Sample size, at least 8.
        false_alarm: Level of the test: the p-value below which it rejects.
        miss: Probability allowed of not rejecting.

    Returns:
        Ratios (low, high) of the true variance to the one predicted: a ratio below low or above
        high is rejected with probability of at least 1 - miss.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> low, high = detectable_variance_ratio(240, false_alarm=1e-4, miss=0.01)
        >>> round(low, 2), round(high, 2)
        (0.56, 1.75)
    """
    if not (n >= _FEWEST and 0 < false_alarm < 1 and 0 < miss < 1):
        raise ArgumentError(
            "these are not a sample size and two error rates",
            received=f"n={n!r}, false_alarm={false_alarm!r}, miss={miss!r}",
            expected=f"n of at least {_FEWEST}, and two probabilities",
            remedy="n=240, false_alarm=1e-4, miss=0.01",
        )
    chi = stats.chi2(n - 1)
    lower, upper = chi.ppf(false_alarm / 2), chi.isf(false_alarm / 2)
    return float(lower / chi.isf(miss)), float(upper / chi.ppf(miss))


def circular_distance(angles: ArrayLike, cdf: Callable[[Array], Array]) -> float:
    r"""Wasserstein distance on the circle between angles and a law, in radians.

    The mean distance by which the angles have to be moved, along the shorter way,
    to have the law: W_1 = min over c of the integral of |F_n - F - c| around the circle, whose
    minimum is at the median of the difference. A sample of the law itself has a distance of order
    1 / sqrt(n), not 0.

    Args:
        angles: Angles (n,); whole turns do not matter.
        cdf: The law's distribution function, as in :func:`watson_test`.

    Returns:
        The distance, between 0 and pi, to about 1e-3.

    Raises:
        ArgumentError: If the sample cannot be used.

    Example:
        >>> from manifold_sde.verification.exact import WrappedNormal
        >>> law = WrappedNormal(0.0, 0.1)
        >>> round(circular_distance(law.sample(10**5, seed=0) + 0.25, law.cdf), 2)
        0.25

    References:
        Cabrelli and Molter, The Kantorovich metric for probability measures on the circle,
        J. Comput. Appl. Math. 57 (1995).
    """
    sample = np.sort(wrap(_sample(angles, "angles")))
    grid = -math.pi + 2.0 * math.pi * (np.arange(_GRID) + 0.5) / _GRID
    empirical = np.searchsorted(sample, grid, side="right") / len(sample)
    difference = empirical - cdf(grid)
    return float(2.0 * math.pi * np.abs(difference - np.median(difference)).mean())


def holm(p_values: Sequence[float]) -> Array:
    """Holm's p-values for several tests at once, in the order given.

    Rejecting what is below alpha raises one false alarm or more with probability at most alpha,
    however the tests depend on each other.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def _sample(values: ArrayLike, name: str) -> Array:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim == 0 or sample.shape[-1] < _FEWEST or not bool(np.isfinite(sample).all()):
        finite = "" if np.isfinite(sample).all() else ", some not finite"
        raise ArgumentError(
            f"the {name} are not a sample that can be tested",
            received=f"shape {sample.shape}{finite}",
            expected=f"at least {_FEWEST} finite values",
            remedy="more runs; runs that blew up are a finding of their own",
        )
    return sample


def _plain(value: Array) -> Any:
    return float(value) if np.ndim(value) == 0 else value
