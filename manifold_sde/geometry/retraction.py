"""Newton's method back to the manifold, once for all routes."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.columns import column_norms
from manifold_sde.geometry.normal_space import NormalSpace

#: Last step of a retraction that has arrived, relative to the norm.
ARRIVED = {torch.float64: 1e-12, torch.float32: 1e-5}


def retract(
    space: NormalSpace, x: Tensor, basis: Tensor, fresh_steps: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the manifold near x, with the norms of x.

    The number of steps is fixed, so that nothing waits for a result.

    Args:
        space: The route.
        x: Points near the manifold (D, n).
        basis: Reference bases nearby (D, d, n).
        fresh_steps: Newton steps with derivatives of their own, besides those that the route adds.

    Returns:
        Points (D, n), reference bases there (D, d, n), and whether the point arrived, (n,): one
        that did not is NaN.
    """

    def at_unit_vectors(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = y[0]
        for _ in range(fresh_steps + space.fresh_steps):
            y, left, near = space.newton_step(y, near)
        frame, near = space.settle(y, near)
        for _ in range(space.shared_steps):
            y, left = space.shared_step(y, frame)
        return y, near, left

    r = column_norms(x)
    y, near, left = space.over_points(at_unit_vectors, x / r, basis)
    arrived = left <= ARRIVED.get(x.dtype, 1e-4)
    return torch.where(arrived, y * r, torch.nan), near, arrived
