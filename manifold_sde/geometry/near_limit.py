r"""The limit map Phi of many weights of SGD at once, to an accuracy that a plot can show.

``Geometry.limit_map`` follows gradient flow to ten digits, one point after the other. Here the flow
is followed by few steps of an exponential midpoint rule, all points at once: with residuals r and
their Jacobian J at the middle of a step, linearised there, and H = J^T J / Xi,

.. math::

    x' = -J^\top (r + J (x - x_\mathrm{mid})) / \Xi

is solved exactly. The steps grow by one factor, from the fastest direction to the slowest, and
Newton's method does the rest. On networks of the digits of 1,000 to 10,000 weights it takes a
twentieth to a fifth of the time, and is off Phi by 3e-6 to 5e-6 of the norm where minimisers were
moved by .03 of it in random directions, and by 4e-4 to 7e-4 where by .3: whoever takes it measures
how far it is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.geometry import Geometry
from manifold_sde.loss import LeastSquaresLoss

#: Factor from one step to the next.
_GROWTH = 2.0
#: Eigenvalue relative to the largest that counts as 0.
_NONE = 1e-13
_AT_ONCE = 8


def flow_steps(fastest: float, slowest: float) -> list[float]:
    """Steps in flow time from the largest eigenvalue of H to its smallest that is not 0.

    Example:
        >>> flow_steps(1.0, 0.1)
        [1.0, 2.0, 4.0, 8.0, 16.0]
    """
    count = 1 + max(0, math.ceil(math.log(fastest / slowest, _GROWTH)))
    return [_GROWTH**i / fastest for i in range(count)]


def near_limit(geometry: Geometry, x: Tensor, steps: Sequence[float]) -> Tensor:
    """Points (n, D) of the manifold near Phi(x), for a scale-invariant least-squares problem.

    The weights x (n, D) are near the manifold, of any norm; ``steps`` are those at norm 1.

    Raises:
        NotOnManifoldError: If some do not arrive; the others are in its ``partial``.
    """
    loss = geometry.problem.pointwise
    assert isinstance(loss, LeastSquaresLoss)
    norms = x.norm(dim=1, keepdim=True)

    def follow(z: Tensor) -> Tensor:
        known = _linearise(loss, z)
        for step in steps:
            # The middle is found with the Jacobian known, which it then replaces.
            middle = known.flow(z, loss.residuals(z), 0.5 * step)
            known = _linearise(loss, middle)
            z = known.flow(z, known.residuals + known.jacobian @ (z - middle), step)
            z = z / z.norm()
        return z

    with torch.no_grad():
        return geometry.retract(norms * vmap(follow, chunk_size=_AT_ONCE)(x / norms))


@dataclass(frozen=True)
class _Linear:
    """Residuals, linear around one point: their values there, J, and the spectrum of J J^T / Xi."""

    residuals: Tensor
    jacobian: Tensor
    values: Tensor
    vectors: Tensor
    n_samples: int

    def flow(self, x: Tensor, residuals: Tensor, time: float) -> Tensor:
        """Flow from x (D,), where the residuals are these, over a time."""
        decay = -torch.expm1(-time * self.values) / self.values
        moved = self.vectors @ (decay * (self.vectors.T @ residuals))
        result: Tensor = x - self.jacobian.T @ moved / self.n_samples
        return result


def _linearise(loss: LeastSquaresLoss, x: Tensor) -> _Linear:
    jacobian = loss.jacobian(x)
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T / loss.n_samples)
    values = torch.maximum(values, _NONE * values[-1])
    return _Linear(loss.residuals(x), jacobian, values, vectors, loss.n_samples)
