"""Are the limit theorems true here: statistical checks of sections 3 and 4, and Theorem 5.5."""

from manifold_sde.verification.laws import LIMIT_THEOREMS as CHECKS

__all__ = ["CHECKS"]
