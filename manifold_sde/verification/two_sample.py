r"""Do two samples have one law? An omnibus test, and tests of declared functionals.

The omnibus test is that of the energy distance,

.. math::

    2 E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|,

which is 0 for equal laws alone. It is the squared distance of two mean embeddings in the space of
the kernel k(x, y) = (|x - o| + |y - o| - |x - y|) / 2, here of their projections onto the span of
some points of the samples (Nystrom's method). By the central limit theorem in that space its law
under the hypothesis is a weighted sum of chi-squared variables, whose tail is found by saddlepoint
approximation: no permutations, and p-values as small as they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from manifold_sde.errors import ArgumentError
from manifold_sde.verification.statistics import TestResult, holm

Array = NDArray[np.float64]

#: Points onto whose span the embeddings are projected.
_LANDMARKS = 150
#: Fewest members of a sample.
_FEWEST = 50
#: Cells of a manifold by its dimension.
CELLS = {1: 16, 2: 32}
#: Share of the trace of the covariance below which its eigenvalues count as 0.
_NEGLIGIBLE = 1e-10


def energy_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    seed: int = 0,
    tolerated: tuple[ArrayLike, ArrayLike] | None = None,
) -> TestResult:
    """Test whether two samples have one law, by the energy distance.

    The p-value is asymptotic. It is right to a tenth from some 200 members on, down to 1e-4.

    With ``tolerated`` the hypothesis is that the laws are no farther from each other than those
    of two samples whose members belong together in pairs (such as paths at two times). By the
    triangle inequality that distance is taken from the one found; the p-value is then a bound.

    Args:
        a: Independent members of the first sample (n, d), n of at least 50.
        b: Of the second (m, d).
        seed: Seed of the choice of landmarks.
        tolerated: Pairs (p, d), (p, d) whose distance is no departure.

    Returns:
        n m / (n + m) times the energy distance (of the projections), and the p-value.

    Raises:
        ArgumentError: If the samples cannot be used.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.normal(size=(2, 500, 3))
        >>> energy_test(a, b).p_value > 1e-3, energy_test(a, 1.3 * b).p_value < 1e-4
        (True, True)

    References:
        Szekely and Rizzo, Energy statistics, J. Stat. Plan. Inference 143 (2013); Gretton et al.,
        A fast, consistent kernel two-sample test, NeurIPS 2009; Kuonen, Saddlepoint approximations
        for distributions of quadratic forms in normal variables, Biometrika 86 (1999).
    """
    first, second = _samples(a, b)
    n, m = len(first), len(second)
    rng = np.random.default_rng(seed)
    both = np.concatenate([first, second])
    unit = max(float(np.abs(both - both.mean(0)).mean()), 1e-300)
    both = both / unit
    origin = both.mean(0)
    landmarks = both[rng.choice(n + m, min(_LANDMARKS, n + m), replace=False)]
    features = _features(both, landmarks, origin)
    gap = features[:n].mean(0) - features[n:].mean(0)
    scale = n * m / (n + m)
    within = ((n - 1) * np.cov(features[:n].T) + (m - 1) * np.cov(features[n:].T)) / (n + m - 2)
    weights = scipy.linalg.eigvalsh(np.atleast_2d(within))
    weights = weights[weights > _NEGLIGIBLE * max(weights.sum(), 1e-300)]
    statistic = scale * float(gap @ gap)
    if not len(weights):
        return TestResult(statistic, 1.0 if statistic < 1e-12 else 0.0)
    slack = 0.0
    if tolerated is not None:
        left, right = (
            _features(np.asarray(x, dtype=np.float64) / unit, landmarks, origin) for x in tolerated
        )
        slack = math.sqrt(scale * _squared_mean(left - right))
    beyond = max(math.sqrt(statistic) - slack, 0.0) ** 2
    return TestResult(2.0 * statistic, weighted_chi_squared_tail(beyond, weights))


def _squared_mean(differences: Array) -> float:
    """Square of the mean of independent vectors (n, k), without what their spread adds to it."""
    mean = differences.mean(0)
    spread = float(differences.var(0, ddof=1).sum()) / len(differences)
    return max(float(mean @ mean) - spread, 0.0)


def _features(points: Array, landmarks: Array, origin: Array) -> Array:
    """Coordinates (n, k) of the embeddings of points on the span of the landmarks."""

    def kernel(x: Array, y: Array) -> Array:
        to_origin = np.linalg.norm(x - origin, axis=1)[:, None]
        between = np.linalg.norm(x[:, None] - y[None], axis=2)
        return 0.5 * (to_origin + np.linalg.norm(y - origin, axis=1) - between)

    values, vectors = scipy.linalg.eigh(kernel(landmarks, landmarks))
    kept = values > 1e-9 * values[-1]
    basis = vectors[:, kept] / np.sqrt(values[kept])
    blocks = np.array_split(points, max(1, len(points) // 2000))
    return np.concatenate([kernel(block, landmarks) @ basis for block in blocks])


def weighted_chi_squared_tail(value: float, weights: ArrayLike) -> float:
    """P(sum_i w_i Z_i^2 > value) for independent standard normals Z_i, to some percent.

    Args:
        value: The value.
        weights: The weights w (k,), positive.

    Returns:
        The probability, by saddlepoint approximation.

    Example:
        >>> round(weighted_chi_squared_tail(18.3, [1.0] * 10) / 0.0500, 2)
        1.0
    """
    w = np.asarray(weights, dtype=np.float64)
    if value <= 0.0:
        return 1.0
    top = float(w.max())
    w, x = w / top, value / top

    def slope(s: float) -> float:
        return float((w / (1.0 - 2.0 * s * w)).sum()) - x

    high = 0.5 * (1.0 - 1e-12)
    low = -0.5 * len(w) / x - 1.0
    s = float(scipy.optimize.brentq(slope, low, high, xtol=1e-14))
    if abs(s) < 1e-5:
        # At the mean the formula is 0/0: between two values beside it.
        shift = 1e-3 * math.sqrt(2.0 * float((w**2).sum()))
        both = [weighted_chi_squared_tail(x + d, w) for d in (-shift, shift)]
        return 0.5 * sum(both)
    cumulant = -0.5 * float(np.log1p(-2.0 * s * w).sum())
    root = math.copysign(math.sqrt(max(2.0 * (s * x - cumulant), 0.0)), s)
    curvature = s * math.sqrt(2.0 * float(((w / (1.0 - 2.0 * s * w)) ** 2).sum()))
    return float(stats.norm.sf(root + math.log(curvature / root) / root))


@dataclass(frozen=True)
class LawComparison:
    """Outcome of the comparison of two samples.

    Attributes:
        p_value: Holm's p-value of all the tests together: below alpha with probability at most
            alpha if the laws are equal.
        worst: Name of the test with the smallest p-value.
        p_values: The p-value of each test, before Holm's correction.
        z: For each functional, the difference of the means in standard errors.
    """

    p_value: float
    worst: str
    p_values: Mapping[str, float]
    z: Mapping[str, float]


def compare_laws(
    a: Array,
    b: Array,
    functionals: Mapping[str, Callable[[Array], Array]],
    *,
    seed: int = 0,
) -> LawComparison:
    """Compare two samples by the energy distance and by the means of declared functionals.

    Args:
        a: Independent members of the first sample (n, d).
        b: Of the second (m, d).
        functionals: Names and functions (n, d) -> (n,), declared before drawing.
        seed: Seed of the omnibus test.

    Returns:
        The comparison.

    Raises:
        ArgumentError: If the samples cannot be used.
    """
    first, second = _samples(a, b)
    p_values = {"energy distance": float(energy_test(first, second, seed=seed).p_value)}
    z = {}
    for name, function in functionals.items():
        z[name] = mean_difference(function(first), function(second))
        p_values[name] = float(2.0 * stats.norm.sf(abs(z[name])))
    together = holm(list(p_values.values()))
    worst = min(p_values, key=lambda name: p_values[name])
    return LawComparison(float(together.min()), worst, p_values, z)


def mean_difference(a: ArrayLike, b: ArrayLike) -> float:
    """Difference of the means of two samples of numbers, in standard errors (Welch).

    Differences at rounding level of samples without spread count as none.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    gap = float(x.mean() - y.mean())
    error = math.sqrt(float(x.var(ddof=1)) / len(x) + float(y.var(ddof=1)) / len(y))
    rounding = 1e-9 * max(float(np.abs(x).max()), float(np.abs(y).max()), 1e-300)
    return 0.0 if abs(gap) <= rounding else gap / max(error, rounding / 1e6)


def total_variation(a: Array, b: Array, centers: Array) -> tuple[float, float]:
    """Total variation distance of the laws on cells, with its standard error.

    It is the largest difference of the probabilities of unions of cells. Estimated by the same
    sample that chooses the union it would be too large by the order of sqrt(cells / n): here each
    half of the samples chooses the union on which the other half is counted, and the two are
    averaged. The result has no positive bias, and is near 0 or below for equal laws.

    Args:
        a: Independent points (n, D).
        b: Independent points (m, D).
        centers: Centres of the cells (k, D); a point belongs to the nearest.

    Returns:
        The distance, which is at most that of the laws themselves, and its standard error.
    """
    labels = [_nearest(sample, centers) for sample in (a, b)]
    values, variances = [], []
    for fold in (0, 1):
        chosen, counted = (
            [_shares(label[which::2], len(centers)) for label in labels]
            for which in (fold, 1 - fold)
        )
        union = chosen[0] > chosen[1]
        p, q = float(counted[0][union].sum()), float(counted[1][union].sum())
        sizes = [len(label[1 - fold :: 2]) for label in labels]
        values.append(p - q)
        variances.append(max(p * (1 - p), 0.25 / sizes[0]) / sizes[0])
        variances[-1] += max(q * (1 - q), 0.25 / sizes[1]) / sizes[1]
    return 0.5 * sum(values), 0.5 * math.sqrt(sum(variances))


def _nearest(points: Array, centers: Array) -> NDArray[np.int64]:
    products = points @ centers.T - 0.5 * (centers**2).sum(1)
    return np.asarray(products.argmax(1), dtype=np.int64)


def _shares(labels: NDArray[np.int64], count: int) -> Array:
    return np.bincount(labels, minlength=count) / len(labels)


def runs_for_mean(effect: float, false_alarm: float, miss: float, samples: int = 2) -> int:
    """Runs in each sample that find a difference of two means.

    Args:
        effect: The difference in standard deviations.
        false_alarm: False-alarm rate of the two-sided test.
        miss: Rate at which it may be missed.
        samples: 2 for two samples of this size, 1 if the other mean is known.

    Returns:
        The number n = samples ((z_{alpha/2} + z_beta) / effect)^2, rounded up, at least 50.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> runs_for_mean(0.2, false_alarm=1e-4, miss=0.01)
        1933
    """
    if not (effect > 0 and math.isfinite(effect) and 0 < false_alarm < 1 and 0 < miss < 1):
        raise ArgumentError(
            "no sample size follows from these",
            received=f"effect={effect!r}, false_alarm={false_alarm!r}, miss={miss!r}",
            expected="a positive effect, and two probabilities",
            remedy="effect=0.2, false_alarm=1e-4, miss=0.01",
        )
    quantiles = stats.norm.isf(false_alarm / 2) + stats.norm.isf(miss)
    return max(_FEWEST, math.ceil(samples * (quantiles / effect) ** 2))


def _samples(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    first, second = (np.asarray(x, dtype=np.float64) for x in (a, b))
    fits = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not fits or min(len(first), len(second)) < _FEWEST or not _finite(first, second):
        raise ArgumentError(
            "these are not two samples that can be compared",
            received=f"shapes {first.shape} and {second.shape}"
            + ("" if _finite(first, second) else ", some values not finite"),
            expected=f"(n, d) and (m, d), n and m at least {_FEWEST}, finite",
            remedy="more runs; runs that blew up are a finding of their own",
        )
    return first, second


def _finite(*samples: Array) -> bool:
    return all(bool(np.isfinite(sample).all()) for sample in samples)
