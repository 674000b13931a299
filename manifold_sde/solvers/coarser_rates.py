r"""The same run of SGD in fewer, larger steps.

SGD with weight decay takes, up to the factor :math:`a_k`, the path of SGD without it at the
learning rates :math:`\tilde\eta_k = \eta_k / (a_k a_{k+1})`, and has the time
:math:`t_0 = \sum \tilde\eta_k^2` (:mod:`manifold_sde.time_scale`). One step in place of m has
the same law in the limit if it has the same :math:`\sum \tilde\eta^2` and the same a: from count
p to count q,

.. math::

    \eta' = a_p a_q \Bigl(\sum_{p \le k < q} \tilde\eta_k^2\Bigr)^{1/2}, \qquad
    1 - \eta'\lambda' = a_q / a_p .

Its step on the sphere is :math:`\sqrt m` times as large, all along the path: constant rates become
:math:`\sqrt m\,\eta` and :math:`\sqrt m\,\lambda`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifold_sde.time_scale import TimeScale

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CoarserRates:
    """A run of fewer steps with the same limit.

    Attributes:
        lr: Learning rates (j,).
        weight_decay: Weight decays (j,).
        counts: Numbers of its steps at which the given counts are reached, (K,).
        coarseness: How many times as large its steps are, up to each of them (K,).
    """

    lr: Array
    weight_decay: Array
    counts: NDArray[np.int64]
    coarseness: Array


def coarser_rates(scale: TimeScale, counts: NDArray[np.int64], merge: int) -> CoarserRates:
    """Learning rates and weight decays of a run with about ``merge`` steps in one.

    Args:
        scale: Learning rate and weight decay of the run.
        counts: Increasing positive step counts, each of which ends a step of the new run, (K,).
        merge: Number m of steps that become one, at least 1.
    """
    edges = np.zeros(1, dtype=np.int64)
    reached = []
    for count in counts.tolist():
        first = int(edges[-1])
        blocks = max(1, round((count - first) / merge))
        inner = np.linspace(first, count, blocks + 1).round().astype(np.int64)
        edges = np.concatenate([edges, inner[1:]])
        reached.append(len(edges) - 1)
    log_time = np.asarray(scale.log_accumulated(edges), dtype=float)
    log_shrinkage = np.asarray(scale.log_shrinkage(edges), dtype=float)
    before, after = log_time[:-1], log_time[1:]
    resting = before == after  # learning rate 0
    with np.errstate(divide="ignore", invalid="ignore"):
        gained = after + np.log(-np.expm1(before - after))
    lr = np.where(resting, 0.0, np.exp(0.5 * gained + log_shrinkage[:-1] + log_shrinkage[1:]))
    lost = -np.expm1(np.diff(log_shrinkage))
    weight_decay = np.where(resting, 0.0, lost / np.where(resting, 1.0, lr))
    found = np.array(reached)
    return CoarserRates(lr, weight_decay, found, np.sqrt(counts / found))


def largest_merge(stability: float, steps: int, *, limit: float, fewest: int) -> int:
    """Most steps that may become one.

    Args:
        stability: Largest step of the run times the largest eigenvalue of H.
        steps: Number of steps of the run.
        limit: Largest value of the stability that the coarser run may have.
        fewest: Fewest steps that it may have.
    """
    return max(1, min(math.floor((limit / stability) ** 2), steps // fewest))
