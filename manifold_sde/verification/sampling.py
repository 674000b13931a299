"""Points of the manifold of minimisers: where gradient flow ends, random walks, farthest points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_sde.errors import ManifoldSDEError, PartialError
from manifold_sde.geometry import Geometry
from manifold_sde.geometry.minimizers import limits

#: A step counts as one along the manifold where the way back to it is at most this part of it.
_CORRECTION = 0.25


def unit(x: Tensor) -> Tensor:
    """Vectors (..., D) at norm 1; 0 stays 0."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)


def retracted(geometry: Geometry, x: Tensor) -> Tensor:
    """Points of Gamma_1 near x by Newton's method, NaN where it does not arrive: (n, D)."""
    there = x / x.norm(dim=1, keepdim=True)
    good = torch.isfinite(there).all(1)
    y = torch.full_like(x, math.nan)
    if bool(good.any()):
        try:
            y[good] = geometry.retract(there[good])
        except PartialError as error:
            if error.partial is not None:
                y[good] = error.partial
    return y / y.norm(dim=1, keepdim=True)


def along_manifold(geometry: Geometry, y: Tensor, v: Tensor) -> Tensor:
    """Part of vectors that is tangent to Gamma_1: (n, D), (n, D) -> (n, D)."""
    return geometry.tangent_projection(y, v - y * (v * y).sum(1, keepdim=True))


def advance(geometry: Geometry, y: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """Step along Gamma_1, where it is seen to be one.

    Args:
        geometry: The geometry.
        y: Points of Gamma_1 (n, D).
        move: Tangent displacements (n, D).

    Returns:
        The new points (n, D), and whether the way back to the manifold was at most a quarter of
        the step (n,): a step that is bent more, or that has left for another sheet, is false.
    """
    there = y + move
    moved = retracted(geometry, there)
    # The unit sphere takes |move|^2 / 2 back without any bend of the manifold in it.
    back = (moved - there / there.norm(dim=1, keepdim=True)).norm(dim=1)
    return moved, back <= _CORRECTION * move.norm(dim=1)


def random_walk(
    geometry: Geometry,
    y: Tensor,
    noise: Tensor,
    stride: float,
    *,
    far: bool = False,
    adapting: bool = False,
) -> Tensor:
    """Random walks on Gamma_1 in all directions, whatever the noise of the problem.

    Args:
        geometry: The geometry.
        y: Points of Gamma_1 (n, D).
        noise: Standard normals (K, n, D), of whose tangent parts the directions are.
        stride: Length of a step.
        far: Whether gradient flow takes a step back to Gamma_1, however long it is. Otherwise
            steps that :func:`advance` does not see to be along it are not made, and the walk does
            not leave its component.
        adapting: Whether a walk that a step would take off the manifold tries half the step next,
            and then longer ones again. It passes where the manifold is bent more.

    Returns:
        The points after each step, (K, n, D).
    """
    visited = []
    length = torch.full((len(y), 1), stride, dtype=y.dtype)
    for z in noise:
        along = along_manifold(geometry, y, z)
        move = length * along / along.norm(dim=1, keepdim=True).clamp(min=1e-12)
        if far:
            moved = limits(geometry, y + move)
            moved = moved / moved.norm(dim=1, keepdim=True)
            good = torch.isfinite(moved).all(1)
        else:
            moved, good = advance(geometry, y, move)
        y = torch.where(good[:, None], moved, y)
        if adapting:
            length = torch.where(good[:, None], (1.5 * length).clamp(max=stride), 0.5 * length)
        visited.append(y)
    return torch.stack(visited)


def of_rank(geometry: Geometry, points: Tensor, rank: int) -> Tensor:
    """Those of points (n, D) at which the Hessian has this rank."""
    if not len(points):
        return points
    try:
        return points[geometry.rank(points) == rank]
    except ManifoldSDEError:
        # Some are not on a manifold of this rank: one by one.
        kept = [of_rank(geometry, p[None], rank) for p in points] if len(points) > 1 else []
        return torch.cat([points[:0], *kept])


def farthest(points: Tensor, count: int) -> Tensor:
    """The first of points (n, D), and then the farthest from those chosen before, (count, D)."""
    chosen = [points[0]]
    distances = (points - chosen[0]).norm(dim=1)
    for _ in range(count - 1):
        chosen.append(points[int(distances.argmax())])
        distances = torch.minimum(distances, (points - chosen[-1]).norm(dim=1))
    return torch.stack(chosen)
