"""Are the limit theorems true here: statistical checks of sections 3 and 4, and Theorem 5.5."""

from manifold_sde.verification.check import Check
from manifold_sde.verification.limit_theorems import convergence, integrators, norms, time_change

__all__ = ["CHECKS"]

#: The checks, in the order in which they are made.
CHECKS: tuple[Check, ...] = (
    *integrators.CHECKS,
    *convergence.CHECKS,
    *time_change.CHECKS,
    *norms.CHECKS,
)
