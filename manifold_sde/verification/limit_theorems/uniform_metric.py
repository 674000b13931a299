"""The uniform metric of Definition 2.9, between functions that step and straight lines."""

from __future__ import annotations

import math

import numpy as np

from manifold_sde.paper import implements
from manifold_sde.verification.limit_theorems.functionals import Array

#: Horizons T beyond which 2^-T is below rounding.
HORIZONS = 53


@implements("Definition 2.9")
def distance_from_line(jumps: Array, values: Array, slope: float) -> float:
    r"""d_U(f, g) of a step function f with f(0) = 0 and the line g(t) = slope t.

    .. math::

        d_U(f, g) = \sum_{T=1}^{\infty} 2^{-T} \min\{1, \sup_{t \in [0, T)} |f(t) - g(t)|\}

    The supremum is taken over both sides of every jump and the end of [0, T).

    Args:
        jumps: Times of the jumps, increasing, (n,).
        values: Values from each of them on, (n,).
        slope: Slope of the line.

    Returns:
        The distance; the tail of T beyond 53, below rounding, is left out.

    Example:
        >>> jumps = np.arange(1.0, 60.0)
        >>> distance_from_line(jumps, jumps, 1.0)  # floor(t) and t: sup is 1 on every [0, T)
        1.0
    """
    before = np.concatenate([[0.0], values[:-1]])
    line = slope * jumps
    gaps = np.maximum.accumulate(np.maximum(np.abs(before - line), np.abs(values - line)))
    total = 0.0
    for horizon in range(1, HORIZONS + 1):
        # Jumps at T itself are outside [0, T), but its left limit is inside.
        index = int(np.searchsorted(jumps, horizon, side="left"))
        inside = float(gaps[index - 1]) if index else 0.0
        last = float(values[index - 1]) if index else 0.0
        supremum = max(inside, abs(last - slope * horizon))
        total += 2.0**-horizon * min(1.0, supremum)
    return total / (1.0 - 2.0**-HORIZONS)


def order(steps: Array, distances: Array) -> float:
    """Slope of log distance in log step, by least squares; infinite where all are 0."""
    if bool((distances <= 1e-14).any()):
        return math.inf
    return float(np.polyfit(np.log(steps), np.log(distances), 1)[0])
