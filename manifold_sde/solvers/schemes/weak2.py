r"""A scheme of weak order 2 for noise of any kind, by products of the noise alone.

With the Stratonovich fields :math:`V_0` (drift) and :math:`V_j` (columns of P sigma), a step is

.. math::

    e^{\frac h2 V_0}\; e^{\sum_j S^1_j V_j}\; e^{\sum_j S^2_j V_j}\; e^{\frac h2 V_0},

where :math:`S^1, S^2` are Gaussian with variances 3h/4 and covariance -h/4. The two flows of the
noise in the middle have the mean :math:`\exp(\frac h2 \sum_j V_j^2) + O(h^3)` (Ninomiya and
Ninomiya, Finance and Stochastics 13, 2009, with u = 3/4 and the drift split off symmetrically).
Their sum is the Brownian increment and their difference is independent of it. The flows of the
noise are taken with the classical Runge-Kutta scheme of order 4, whose leading error is odd in S
and so of mean O(h^3), the flow of the drift with the midpoint rule.

The fields are extended off the manifold smoothly and are tangent on it, so that the flows stay on
it; what the Runge-Kutta schemes leave is removed by a retraction, which being smooth and the
identity on the manifold does not lower the order.
"""

from __future__ import annotations

import math

from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes.base import Scheme, StepNoise, half


class Weak2(Scheme):
    """Drift, two correlated flows of the noise, drift."""

    name = "weak2"
    calculus = "stratonovich"
    weak_order = 2
    strong_order_commutative = 1.0
    cost = "19 D + 6"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        across = math.sqrt(2.0) * h.sqrt() * noise.extra()
        h = half(h)
        x = x + h * sde.drift(x + half(h) * sde.drift(x, basis), basis)
        for w in (0.5 * (noise.dw + across), 0.5 * (noise.dw - across)):
            x = self.noise_flow(sde, x, basis, w)
        x = x + h * sde.drift(x + half(h) * sde.drift(x, basis), basis)
        return sde.retract(x, basis, fresh_steps=1)

    @staticmethod
    def noise_flow(sde: StochasticEquation, x: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """The flow of the noise's fields along w, by one Runge-Kutta step of order 4."""
        k1 = sde.noise(x, basis, w)
        k2 = sde.noise(x + 0.5 * k1, basis, w)
        k3 = sde.noise(x + 0.5 * k2, basis, w)
        k4 = sde.noise(x + k3, basis, w)
        return sde.moved_by_noise(x, x + (k1 + 2.0 * (k2 + k3) + k4) / 6.0)
