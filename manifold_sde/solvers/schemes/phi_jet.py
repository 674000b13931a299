r"""A scheme that moves off the manifold by the noise and comes back by gradient flow.

.. math::

    Y^+ = e^{-ch}\, \Phi(Y + \sigma(Y)\,\Delta W)

The mean of Phi(Y + sigma dW) is Y + (h/2) d^2 Phi[Sigma] + O(h^2) (a 2-jet in the sense of
Armstrong and Brigo, arXiv:1602.03931): the scheme has weak order 1 and shares nothing with those
that evaluate d^2 Phi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.columns import column_norms
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import LimitMapError
from manifold_sde.geometry import Geometry
from manifold_sde.sdes import DirectionDiffusion, FixedRatioDiffusion
from manifold_sde.solvers.schemes.base import Scheme, StepNoise


class PhiJet(Scheme):
    """The limit map of gradient flow in place of drift and projection."""

    name = "phi_jet"
    calculus = None
    weak_order = 1
    strong_order_commutative = 0.5
    cost = "the limit map: some 100 + 10 D"

    def step(
        self, sde: StochasticEquation, x: Tensor, basis: Tensor, h: Tensor, noise: StepNoise
    ) -> tuple[Tensor, Tensor]:
        """One step."""
        moved = x + sde.ambient_noise(x, noise.dw)
        good = torch.isfinite(moved).all(dim=0)
        points = torch.where(good, moved, x.nan_to_num(nan=1.0)).T.contiguous()
        try:
            limit = _geometry(sde).limit_map(points)
        except LimitMapError as error:
            limit = torch.full_like(points, torch.nan)
            if error.partial is not None:
                limit = error.partial
        y = torch.where(good, limit.T, torch.nan)
        if isinstance(sde, DirectionDiffusion):
            y = y / column_norms(y)
        elif isinstance(sde, FixedRatioDiffusion):
            y = y * torch.exp(-sde.ratio * h)
        return y.contiguous(), basis


def _geometry(sde: StochasticEquation) -> Geometry:
    assert isinstance(sde, ManifoldEquation)
    return sde.geometry
