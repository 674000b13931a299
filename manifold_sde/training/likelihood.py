"""The exact likelihood of relaxing modes and white noise, for records at irregular clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Variance of where a run starts, over that of the stationary law: the likelihood takes the best.
STARTS = (1.0, 10.0, 100.0, 1000.0)
#: Models whose likelihoods are computed together: their states fit into a processor's cache.
_TOGETHER = 2048


@dataclass(frozen=True, eq=False)
class Runs:
    """Records of functions of the weights, along one run or several.

    Attributes:
        clock: Clock readings (R, K), which do not fall along a run.
        values: The S functions there (S, R, K), NaN behind the end of a run shorter than others.
        common_start: Whether all runs start from one point, at the first reading. The records
            there are one and the same, and are left out.
    """

    clock: Array
    values: Array
    common_start: bool = False

    @property
    def length(self) -> float:
        """The clock from the first record to the last, of the longest run."""
        return float((self.clock.max(1) - self.clock[:, 0]).max())

    @property
    def spacing(self) -> float:
        """The median clock between two records."""
        steps = np.diff(self.clock, axis=1)[self.there[:, 1:]]
        return float(np.median(steps))

    @property
    def there(self) -> NDArray[np.bool_]:
        """Where there are records (R, K)."""
        return np.isfinite(self.values[0])

    @property
    def count(self) -> int:
        """Number of records of a function that the likelihood uses."""
        return int(self.there[:, int(self.common_start) :].sum())

    def means(self, size: int) -> Runs:
        """Means of so many records each; those of a common start are none."""
        blocks = self.clock.shape[1] // size

        def mean(of: Array) -> Array:
            whole = of[..., : blocks * size]
            found: Array = whole.reshape(*of.shape[:-1], blocks, size).mean(-1)
            return found

        return Runs(mean(self.clock), mean(self.values))


def log_likelihood(runs: Runs, tau: Array, weight: Array, function: Any = 0) -> Array:
    r"""Compute log-likelihoods of many models, with mean, scale and start taken out.

    A record is f = mu + x_1 + ... + x_M + white noise; x_m is an Ornstein-Uhlenbeck process in the
    clock, of relaxation time tau_m. With shares w_m of the variance, and 1 - sum w_m for the white
    noise, the likelihood is found by a Kalman filter over the records. The mean has a flat prior
    (REML: with the mean put at its best value, long relaxation times would look unlikely), the
    scale is at its best value, and so is the variance of the start over that of the stationary
    law, among ``STARTS``.

    - Runs with starts of their own start from x_m ~ N(0, kappa w_m).
    - Runs with a common start start from one x_m ~ N(0, kappa w_m), the same for all.

    Args:
        runs: The records.
        tau: Relaxation times (M, G).
        weight: Shares of the variance (M, G), of sum at most 1.
        function: Which of the functions is looked at by each model, one number or (G,).

    Returns:
        The log-likelihoods (G,), up to a constant; minus infinity where a model has no variance.

    Source: Chen and Deo (2010), for the REML likelihood near a unit root.
    """
    which = np.broadcast_to(function, tau.shape[1:])
    parts = [
        _filtered(runs, tau[:, part], weight[:, part], which[part])
        for part in (slice(i, i + _TOGETHER) for i in range(0, tau.shape[1], _TOGETHER))
    ]
    return np.concatenate(parts)


@np.errstate(all="ignore")
def _filtered(runs: Runs, tau: Array, weight: Array, which: Any) -> Array:
    gram, log_det = _gram(runs, tau, weight, which)
    best = np.full(tau.shape[1], -np.inf)
    for start in STARTS:
        spread = start if runs.common_start else start - 1.0
        best = np.fmax(best, _without_start(gram, log_det, spread, runs.count))
    return best


def _gram(runs: Runs, tau: Array, weight: Array, which: Any) -> tuple[Array, Array]:
    """Inner products of the innovations of [f, 1, start of x_1, ...], and the log-determinant.

    The filter is linear: a start at size sqrt(w_m) is followed as one more column, on records 0.
    """
    modes, models = tau.shape
    rows, columns = runs.clock.shape
    white = np.maximum(1.0 - weight.sum(0), 0.0)
    there = runs.there
    values = np.ascontiguousarray(np.where(there, runs.values, 0.0)[which].transpose(2, 1, 0))
    shape = (modes, rows, models)
    covariance = np.zeros((modes, modes, rows, models))
    mean = np.zeros((2 + modes, *shape))
    stationary = np.broadcast_to(weight[:, None], shape)
    for m in range(modes):
        mean[2 + m, m] = -np.sqrt(stationary[m])
        if not runs.common_start:
            covariance[m, m] = stationary[m]
    observed = np.zeros((2 + modes, rows, models))
    observed[1] = 1.0
    gram = np.zeros((2 + modes, 2 + modes, models))
    log_det = np.zeros(models)
    for k in range(columns):
        if k:
            step = (runs.clock[:, k] - runs.clock[:, k - 1])[:, None]
            decay = np.exp(-step / tau[:, None])
            mean *= decay
            covariance *= decay[:, None] * decay
            for m in range(modes):
                covariance[m, m] += stationary[m] * (1.0 - decay[m] ** 2)
        elif runs.common_start:
            continue
        observed[0] = values[k]
        along = covariance.sum(1)  # covariance of each mode with the record
        variance = along.sum(0) + white
        if not there[:, k].all():  # an infinite variance: nothing is learnt
            variance = np.where(there[:, k, None], variance, np.inf)
        innovation = observed - mean.sum(1)
        log_det += np.log(variance, where=there[:, k, None], out=np.zeros_like(variance)).sum(0)
        scaled = innovation / variance
        gram += np.einsum("irg,jrg->ijg", innovation, scaled)
        mean += along * scaled[:, None]
        covariance -= along[:, None] * (along / variance)
    return gram, log_det


def _without_start(gram: Array, log_det: Array, spread: float, count: int) -> Array:
    """Take starts of a variance, then the mean, then the scale out of the likelihood."""
    a: Any = gram.copy()
    modes = len(a) - 2
    a[2:] *= np.sqrt(spread)
    a[:, 2:] *= np.sqrt(spread)
    for m in range(modes):
        a[2 + m, 2 + m] += 1.0
    total = log_det
    for pivot in range(len(a) - 1, 0, -1):
        total = total + np.log(a[pivot, pivot])
        factor = a[pivot, :pivot] / a[pivot, pivot]
        a[:pivot, :pivot] -= factor[:, None] * a[pivot, :pivot]
    found: Array = -0.5 * (total + (count - 1) * np.log(a[0, 0]))
    return np.where(np.isfinite(found), found, -np.inf)
