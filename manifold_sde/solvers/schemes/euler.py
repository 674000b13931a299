"""The Euler-Maruyama scheme with a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes.base import Scheme, StepNoise


class Euler(Scheme):
    """Euler-Maruyama for the Ito form, and Newton's way back to the manifold.

    The Ito drift contains d^2 Phi[Sigma] / 2, whose normal part is what keeps the mean on the
    manifold: the retraction removes what is left, which is of higher order.
    """

    name = "euler"
    calculus = "ito"
    weak_order = 1
    strong_order_commutative = 0.5
    cost = "6 D + d + 7"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        return sde.retract(x + sde.increment(x, basis, h, noise.dw), basis)
