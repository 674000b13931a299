r"""Whether curves collapse on an axis: the part of their variation that the axis leaves open.

Ensembles s = 1..S of paths give mean curves m_s on a common grid of G positions of an axis. Of
their variation, what the axis cannot explain is that between curves at one position,

.. math::

    Q = \frac{\mathrm{mean}_g\, \mathrm{var}_s\, m_s(g)}{\mathrm{var}_{s,g}\, m_s(g)} \in [0, 1],

0 where the curves fall on one, and near 1 where the position says nothing. Means of finitely many
paths differ by chance too; what that adds on average to numerator and denominator is subtracted
from both, so that Q of curves that do collapse is 0 up to its standard error, on either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.experiment import Array

#: A variation of less than so many times its noise is none to speak of.
_SIGNAL = 3.0
#: Differences relative to the values that are rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Collapse:
    """How far curves are from one curve on an axis.

    Attributes:
        unexplained: Q, the part of the curves' variation that is between curves at one position;
            NaN where they do not vary beyond their noise.
        standard_error: Its standard error, by bootstrap over paths.
        p_value: Probability of as much between curves if all paths had one law on this axis, by
            permutation of the paths.
        between, total: Numerator and denominator, without their noise.
    """

    unexplained: float
    standard_error: float
    p_value: float
    between: float
    total: float


@dataclass(frozen=True)
class Distance:
    """How far the mean curve of an ensemble is from a reference, averaged over the grid.

    Attributes:
        difference: Mean difference of the two curves, in the unit of the test function.
        standard_error: Its standard error.
        relative: The difference, divided by how far the reference moves.
        z: The difference in standard errors.
        largest_z: The largest difference at a position, in standard errors there.
    """

    difference: float
    standard_error: float
    relative: float
    z: float
    largest_z: float


def on_grid(positions: Array, values: Array, grid: Array) -> Array:
    """Interpolate paths (K, n), linearly in their positions (K,) or (K, n), at a grid: (n, G).

    Raises:
        ArgumentError: If the grid goes beyond a path.

    Example:
        >>> on_grid(np.array([0.0, 2.0]), np.array([[0.0], [4.0]]), np.array([1.0, 2.0]))
        array([[2., 4.]])
    """
    each = np.broadcast_to(positions.reshape(len(values), -1), values.shape)
    slack = 1e-9 * abs(float(grid[-1]))
    if grid[0] < each[0].max() - slack or grid[-1] > each[-1].min() + slack:
        raise ArgumentError(
            "the grid goes beyond the curves",
            received=f"positions from {grid[0]:.6g} to {grid[-1]:.6g}",
            expected=f"at least {each[0].max():.6g} and at most {each[-1].min():.6g}",
            remedy="common_grid(...) of the same positions",
        )
    return np.stack([np.interp(grid, x, v) for x, v in zip(each.T, values.T, strict=True)])


def common_grid(positions: Sequence[Array], points: int) -> Array:
    """Equally spaced positions that all curves reach, without the first, where all agree."""
    start = max(float(np.max(p[0])) for p in positions)
    end = min(float(np.min(p[-1])) for p in positions)
    return np.linspace(start, end, points + 1)[1:]


def collapse(
    curves: Sequence[Array], *, resamples: int = 400, permutations: int = 999, seed: int = 0
) -> Collapse:
    """Measure the collapse of ensembles of independent paths (n_s, G) on a common grid.

    Raises:
        ArgumentError: If there are fewer than two ensembles, or an ensemble has one path.
    """
    if len(curves) < 2 or min(len(c) for c in curves) < 2:
        raise ArgumentError(
            "there is nothing to compare",
            received=f"ensembles of {[len(c) for c in curves]} paths",
            expected="two or more ensembles of two or more paths",
            remedy="more rates, or more paths",
        )
    generator = np.random.default_rng(seed)
    even = [np.full((1, len(c)), 1.0 / len(c)) for c in curves]
    drawn = [
        generator.multinomial(len(c), np.full(len(c), 1.0 / len(c)), resamples) / len(c)
        for c in curves
    ]
    (between,), (total,), noise = _variations(curves, even)
    noise_between, noise_total = (float(part[0]) for part in noise)
    rounding = (_ROUNDING * max(float(np.abs(c).max()) for c in curves)) ** 2
    if not total - noise_total > max(_SIGNAL * noise_total / math.sqrt(len(curves)), rounding):
        return Collapse(math.nan, math.nan, math.nan, 0.0, 0.0)
    # Resampled means carry the noise of the sample, and that of the resampling.
    between_, total_, (extra_between, extra_total) = _variations(curves, drawn)
    below = total_ - noise_total - extra_total
    resampled = (between_ - noise_between - extra_between) / below
    return Collapse(
        unexplained=float((between - noise_between) / (total - noise_total)),
        standard_error=float(np.std(resampled[below > 0], ddof=1)),
        p_value=_permutation_p(curves, permutations, generator),
        between=float(between - noise_between),
        total=float(total - noise_total),
    )


def _variations(
    curves: Sequence[Array], weights: Sequence[Array]
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Variation between curves, their whole variation, and what noise adds to each: (B,) each.

    The paths (n_s, G) have weights (B, n_s), rows of sum 1.
    """
    count = len(curves)
    means, errors, overall = [], [], []
    for paths, weight in zip(curves, weights, strict=True):
        centred = paths - paths.mean(0)  # differences of large numbers would lose digits
        first, second = weight @ centred, weight @ centred**2
        means.append(first + paths.mean(0))
        errors.append((second - first**2) / (len(paths) - 1))
        average = centred.mean(1)
        moment = weight @ average
        overall.append((weight @ average**2 - moment**2) / (len(paths) - 1))
    stacked = np.stack(means)  # (S, B, G)
    stacked = stacked - stacked.mean((0, 1, 2))
    between = stacked.var(0).mean(-1)
    total = (stacked**2).mean((0, 2)) - stacked.mean((0, 2)) ** 2
    error = np.stack(errors).mean((0, 2))
    grand = np.stack(overall).sum(0) / count**2
    return between, total, (error * (1 - 1 / count), error - grand)


def _permutation_p(
    curves: Sequence[Array], permutations: int, generator: np.random.Generator
) -> float:
    """Part of the random divisions of all paths with as much between their means."""
    pooled = np.concatenate(list(curves))
    pooled = pooled - pooled.mean(0)
    ends = np.cumsum([len(c) for c in curves])[:-1]

    def between(paths: Array) -> float:
        means = np.stack([part.mean(0) for part in np.split(paths, ends)])
        return float(means.var(0).mean())

    observed = between(pooled)
    found = [between(pooled[generator.permutation(len(pooled))]) for _ in range(permutations)]
    return (1 + sum(value >= observed for value in found)) / (1 + permutations)


def distance(paths: Array, reference: Array) -> Distance:
    """Distance of the mean of paths (n, G) from that of independent ones (m, G), with the noise."""
    average, other = paths.mean(1), reference.mean(1)
    difference = float(average.mean() - other.mean())
    error = math.sqrt(average.var(ddof=1) / len(average) + other.var(ddof=1) / len(other))
    gaps = paths.mean(0) - reference.mean(0)
    errors = np.sqrt(paths.var(0, ddof=1) / len(paths) + reference.var(0, ddof=1) / len(reference))
    curve = reference.mean(0)
    moved = float(np.ptp(curve))
    rounding = _ROUNDING * float(np.abs(curve).max())
    return Distance(
        difference=difference,
        standard_error=error,
        relative=difference / moved if moved > rounding else math.nan,
        z=difference / error if error > rounding else math.nan,
        largest_z=float(np.max(np.abs(gaps) / np.where(errors > rounding, errors, np.inf))),
    )
