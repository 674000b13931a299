"""Test budgets: how many points are looked at, and what the statistics must find."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from manifold_sde.errors import ArgumentError

#: How many times as long the checks may take where matrices do not fit into memory.
_TIMES_AS_LONG = 10.0


@dataclass(frozen=True)
class Effort:
    """A test budget.

    Attributes:
        name: Its name.
        points: Points at which properties are checked.
        departure: Smallest relative departure that statistical checks must find: of a time
            scale, a variance, a rate or a probability.
        false_alarm: False-alarm rate of each statistical check.
        miss: Rate at which that departure may be missed.
        step_size: Largest eta / |x|^2 of the runs of SGD; the bias of SGD is of this order, and is
            extrapolated from two values of it.
        runs: Largest number of independent runs of a statistical check of a limit theorem. Where
            it is less than the departure asks for, the check declares the departure that it finds.
        steps: Largest number of steps of SGD of these checks, about.
        long_checks: Whether checks are made that take minutes on small problems; where not, they
            are undecided.
        budget: Seconds of processor time for all checks, where nothing else is said; those that
            do not fit are undecided.
        first_share: Part of the budget that a check may take in the first round.
    """

    name: str
    points: int
    departure: float
    false_alarm: float = 1e-4
    miss: float = 0.01
    step_size: float = 0.02
    runs: int = 2048
    steps: int = 512
    long_checks: bool = True
    budget: float = math.inf
    first_share: float = 0.1

    def at_size(self) -> Effort:
        """The budget where matrices of D x D do not fit: few points, and ten times as long."""
        return replace(
            self,
            points=max(1, self.points // 64),
            steps=self.steps // 2,
            budget=_TIMES_AS_LONG * self.budget,
            first_share=2.0 * self.first_share,
        )


QUICK = Effort("quick", points=32, departure=0.25, long_checks=False, budget=60.0)
THOROUGH = Effort("thorough", points=256, departure=0.1, step_size=0.01, runs=16384, steps=2048)
EFFORTS = {effort.name: effort for effort in (QUICK, THOROUGH)}


def effort_of(effort: str | Effort) -> Effort:
    """A test budget by its name.

    Raises:
        ArgumentError: If there is none of this name.
    """
    if isinstance(effort, Effort):
        return effort
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise ArgumentError(
            "there is no such effort",
            received=repr(effort),
            expected=" or ".join(repr(name) for name in EFFORTS),
            remedy='effort="quick" takes about a minute, effort="thorough" some minutes',
        )
    return EFFORTS[effort]
