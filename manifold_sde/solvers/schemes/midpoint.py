"""The explicit midpoint scheme for the Stratonovich form, with a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes.base import Scheme, StepNoise, half


class Midpoint(Scheme):
    """The increment at a predicted middle of the step."""

    name = "midpoint"
    calculus = "stratonovich"
    weak_order = 1
    strong_order_commutative = 1.0
    cost = "8 D + 7"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        middle = x + sde.increment(x, basis, half(h), 0.5 * noise.dw)
        return sde.retract(x + sde.increment(middle, basis, h, noise.dw), basis)
