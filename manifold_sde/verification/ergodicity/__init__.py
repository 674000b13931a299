"""Checks of section 5: the direction forgets where it started, and comes to its equilibrium."""

from manifold_sde.verification.check import Check
from manifold_sde.verification.ergodicity import (
    chains,
    convergence,
    end_law,
    groups,
    independence,
    norm,
    reversible,
    sgd,
    time_averages,
)

#: All of them. They share their simulations, which the first that needs them makes.
CHECKS: tuple[Check, ...] = (
    *end_law.CHECKS,
    *independence.CHECKS,
    *convergence.CHECKS,
    *chains.CHECKS,
    *time_averages.CHECKS,
    *reversible.CHECKS,
    *norm.CHECKS,
    *sgd.CHECKS,
    *groups.CHECKS,
)

__all__ = ["CHECKS"]
