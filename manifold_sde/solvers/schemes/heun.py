"""Heun's scheme for the Stratonovich form, with a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.solvers.schemes.base import Motion, Scheme, StepNoise


class Heun(Scheme):
    """The trapezoidal predictor and corrector: the mean of the increments at both ends."""

    name = "heun"
    calculus = "stratonovich"
    weak_order = 1
    strong_order_commutative = 1.0
    cost = "8 D + 7"

    def step(
        self, motion: Motion, x: Tensor, anchor: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        first = motion.increment(x, anchor, h, noise.dw)
        second = motion.increment(x + first, anchor, h, noise.dw)
        return motion.land(x + 0.5 * (first + second), anchor)
