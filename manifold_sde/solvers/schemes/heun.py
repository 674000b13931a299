"""Heun's scheme for the Stratonovich form, with a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes.base import Scheme, StepNoise


class Heun(Scheme):
    """The trapezoidal predictor and corrector: the mean of the increments at both ends."""

    name = "heun"
    calculus = "stratonovich"
    weak_order = 1
    strong_order_commutative = 1.0
    cost = "8 D + 7"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        first = sde.increment(x, basis, h, noise.dw)
        second = sde.increment(x + first, basis, h, noise.dw)
        return sde.retract(x + 0.5 * (first + second), basis)
