"""A step along the tangent space, and a retraction."""

from __future__ import annotations

from torch import Tensor

from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.solvers.schemes.base import Scheme, StepNoise


class Walk(Scheme):
    """A retraction walk of the direction: the tangent part of the Ito drift, and P sigma dW.

    The retraction moves along the normal space, which makes it one of second order: it supplies
    the normal part of the Ito drift, whose D second derivatives are never taken (Schwarz, Herrmann,
    Sturm and Wardetzky, "Efficient random walks on Riemannian manifolds", arXiv:2202.00959). Where
    D is large this is the cheapest step there is.
    """

    name = "walk"
    calculus = None
    weak_order = 1
    strong_order_commutative = 0.5
    cost = "6 D + 7"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        assert isinstance(sde, ManifoldEquation)
        moved = x + sde.tangent_increment(x, basis, h, noise.dw, noise.extra)
        # Beside a drift by random columns, frames are what a step costs.
        end, basis = sde.retract(moved, basis, fresh_steps=0 if sde.drift_columns else 2)
        return sde.walked(x, h, end), basis
