"""Does the theory apply: checks of the paper's assumptions on a problem.

Each says what holds, fails or cannot be decided, the number behind it, and what it means for
training. They look at minimisers found by gradient flow from independent directions and by walks,
and search along the manifold for the worst point.
"""

from manifold_sde.verification.assumptions import (
    analytic,
    attraction,
    connected,
    controllability,
    groups,
    minimisers,
    scale_invariance,
    smoothness,
)
from manifold_sde.verification.check import Check

#: The checks, in the order in which they are made.
CHECKS: tuple[Check, ...] = (
    *scale_invariance.CHECKS,
    *smoothness.CHECKS,
    *minimisers.CHECKS,
    *groups.CHECKS,
    *connected.CHECKS,
    *controllability.CHECKS,
    *analytic.CHECKS,
    *attraction.CHECKS,
)

__all__ = ["CHECKS"]
