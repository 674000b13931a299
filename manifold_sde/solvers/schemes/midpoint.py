"""The explicit midpoint scheme for the Stratonovich form, with a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.solvers.schemes.base import Motion, Scheme, StepNoise, half


class Midpoint(Scheme):
    """The increment at a predicted middle of the step."""

    name = "midpoint"
    calculus = "stratonovich"
    weak_order = 1
    strong_order_commutative = 1.0
    cost = "8 D + 7"

    def step(
        self, motion: Motion, x: Tensor, anchor: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        middle = x + motion.increment(x, anchor, half(h), 0.5 * noise.dw)
        return motion.land(x + motion.increment(middle, anchor, h, noise.dw), anchor)
