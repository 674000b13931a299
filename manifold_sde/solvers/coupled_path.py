r"""Brownian paths for two runs at steps h and h/2 whose difference is to be small.

Schemes of weak order 2 stand normals :math:`Z`, independent of W, in for the Levy areas. Where the
larger step draws its own, the two steps' areas are independent, and the difference of the states is
of strong order 1/2. Here the larger step's number follows from the Brownian path and the numbers of
its two halves,

.. math::

    Z = \tfrac{1}{\sqrt 3} (\zeta + Z_\text{left} + Z_\text{right}),

with :math:`\zeta` the bridge's normal: it is standard normal and independent of the increment, as
it has to be, and its area is the part of the halves' areas that it can be. What is left changes
sign where the halves change places and all Z their sign: the mean over the two *mirrored* paths
differs from one step to the other by strong order 1.

Source: Giles and Szpruch, Annals of Applied Probability 24, 2014, for the exchange of the halves;
Iguchi, Jasra, Maama and Beskos, arXiv 2403.13489, for schemes of weak order 2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.brownian_nodes import BRIDGE


class Coupling(NamedTuple):
    """How the Brownian paths of two steps belong together.

    Attributes:
        level: Level of the larger step.
        mirrored: Whether the halves of its intervals change places.
    """

    level: int
    mirrored: bool


class CoupledPath(BrownianPath):
    """Brownian motions whose numbers beside W agree at two steps as far as they can.

    Args:
        coupling: The larger step, and whether its halves change places.
        *args: As for :class:`BrownianPath`.
        **options: As for :class:`BrownianPath`.
    """

    def __init__(self, coupling: Coupling, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.coupling = coupling
        if coupling.mirrored:
            self._nodes.mirror(coupling.level)

    def auxiliary(self, level: int | Tensor, position: int | Tensor, count: int) -> Tensor:
        """As :meth:`BrownianPath.auxiliary`; at the larger step from what is below it."""
        coarse = self.coupling.level
        if isinstance(level, Tensor) or level != coarse:
            return super().auxiliary(level, position, count)
        left = super().auxiliary(coarse + 1, 2 * position, count)
        right = super().auxiliary(coarse + 1, 2 * position + 1, count)
        positions = position if isinstance(position, Tensor) else self._nodes.tensor([position])
        levels = torch.full_like(positions, BRIDGE + coarse)
        bridge = self._nodes.draw(rng.STREAM_SDE, count, levels[None], positions[None])[0]
        normal = bridge.to(self.dtype) / (0.5 * math.sqrt(self.cell * 2.0**-coarse))
        return (normal + left + right) / math.sqrt(3.0)
