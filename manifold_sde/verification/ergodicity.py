"""Checks of section 5: the direction forgets where it started, and comes to its equilibrium."""

from manifold_sde.verification.laws import EQUILIBRIUM as CHECKS

__all__ = ["CHECKS"]
