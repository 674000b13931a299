"""Tests that the noise of the steps adds up to a Brownian motion with identity covariance."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from torch import Tensor

from manifold_sde.verification.limit_theorems.functionals import Array
from manifold_sde.verification.limit_theorems.noise_of_steps import StepNoise

#: Constant of Berry and Esseen's theorem (Shevtsova 2011).
_BERRY_ESSEEN = 0.4748


def tests_of_sums(noise: StepNoise, sums: Array, steps: int) -> dict[str, float]:
    """P-values of what the sums over blocks of steps have to be: standard normals, independent.

    Args:
        noise: The noise of the steps.
        sums: Standardised sums (n, q): rows are runs, columns blocks and components.
        steps: Steps in a block.

    Returns:
        P-values by name. Those of mean, variances and correlations are exact for normal noise;
        that of normality allows what Berry and Esseen's theorem allows to sums of other noise.
    """
    n, q = sums.shape
    # Sums of noise with heavier tails have squares that spread more, like fewer normals.
    heavy = 0.0 if noise.gaussian else float(_excess(noise).clamp(min=0.0)) / steps
    share = 2.0 / (2.0 + heavy)
    found = {
        "mean": float(stats.chi2.sf(n * (sums.mean(0) ** 2).sum(), q)),
        "quadratic variation": _squares(float((sums**2).sum()), n * q, share),
        "covariance": _covariance(sums, share),
    }
    gap = float(stats.kstest(sums.ravel(), "norm").statistic)
    allowed = 0.0
    if not noise.gaussian:
        third = float(noise.components.abs().pow(3).mean((0, 1)).max())
        allowed = _BERRY_ESSEEN * third / math.sqrt(steps)
    beyond = gap - allowed
    found["normality"] = 1.0 if beyond <= 0.0 else float(stats.kstwo.sf(beyond, n * q))
    return found


def tests_of_steps(noise: StepNoise) -> dict[str, float]:
    """P-values of the noise of single steps: its size, and that none of it is drawn twice."""
    e, ranks = noise.increments, noise.ranks
    squares = e.square().sum(-1).mean(0)
    wanted = ranks.mean(0)
    difference = squares - wanted
    error = float(difference.std()) / math.sqrt(len(difference))
    mean = abs(float(difference.mean()))
    rounding = 1e-7 * float(wanted.mean())
    size = 0.0 if mean <= rounding else mean / max(error, rounding)
    return {
        "size of the steps' noise": float(2.0 * stats.norm.sf(size)),
        "independence of runs": _most_alike(e.movedim(1, 0).flatten(1), ranks.sum(0)),
        "independence of steps": _most_alike(e.flatten(1), ranks.sum(1)),
    }


def _two_sided(law: stats.rv_frozen, value: float) -> float:
    return float(min(1.0, 2.0 * min(law.sf(value), law.cdf(value))))


def _squares(total: float, count: int, share: float) -> float:
    """P-value of a sum of squares of standard normals, or of sums with heavier tails."""
    return _two_sided(stats.chi2(count * share), total * share)


def _excess(noise: StepNoise) -> Tensor:
    """Largest excess kurtosis of the components of a step."""
    fourth = noise.components.pow(4).mean((0, 1))
    return (fourth / noise.components.square().mean((0, 1)).square() - 3.0).max()


def _covariance(sums: Array, share: float) -> float:
    """Smallest p-value of all variances and correlations, times their number."""
    n, q = sums.shape
    variances = [_squares(float(v), n, share) for v in (sums**2).sum(0)]
    sizes = np.sqrt((sums**2).sum(0))
    correlations = ((sums.T @ sums) / np.outer(sizes, sizes))[np.triu_indices(q, 1)]
    strongest = float(np.abs(correlations).max()) if len(correlations) else 0.0
    t = strongest * math.sqrt((n - 1) / max(1.0 - strongest**2, 1e-300))
    count = len(correlations) + q
    return float(min(1.0, count * min(*variances, float(2.0 * stats.t.sf(t, n - 1)))))


def _most_alike(rows: Tensor, ranks: Tensor) -> float:
    """P-value of the largest correlation of two rows of independent noise.

    Args:
        rows: Rows (a, b).
        ranks: Number of independent components in each row, (a,).
    """
    sizes = rows.norm(dim=1)
    products = rows @ rows.T / (sizes[:, None] * sizes[None]).clamp(min=1e-300)
    products.fill_diagonal_(0.0)
    largest = float(products.abs().max())
    pairs = len(rows) * (len(rows) - 1) / 2
    z = largest * math.sqrt(float(ranks.min()))
    return float(min(1.0, pairs * 2.0 * stats.norm.sf(z)))
