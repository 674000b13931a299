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

    Args:
        space: The route.
        x: Points near the manifold (D, n).
        basis: Reference bases nearby (D, d, n).
        fresh_steps: Newton steps with derivatives of their own, besides those that the route adds.
            Without any, points that did not arrive go on with a further frame.

    Returns:
        Points (D, n), reference bases there (D, d, n), and whether the point arrived, (n,): one
        that did not is NaN.
    """
    small = ARRIVED.get(x.dtype, 1e-4)

    def at_unit_vectors(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left = y.new_full(y.shape[1:], torch.inf)
        for _ in range(fresh_steps + space.fresh_steps):
            y, left, near = space.newton_step(y, near)
        frame, near = space.settle(y, near)
        y, left = space.arrive(y, frame, left, small)
        if fresh_steps == 0 and not bool((left <= small).all()):
            frame, found = space.settle(y, near)
            near = torch.where(left <= small, near, found)
            y, left = space.arrive(y, frame, left, small)
        return y, near, left

    r = column_norms(x)
    y, near, left = space.over_points(at_unit_vectors, x / r, basis)
    arrived = left <= small
    return torch.where(arrived, y * r, torch.nan), near, arrived
