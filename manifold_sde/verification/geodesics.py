r"""Geodesics of Gamma_1 with the metric of R^D, by collocation.

A curve on Gamma_1 is a geodesic if its acceleration is normal to Gamma_1, and what is normal is
given: differentiating grad L(y) = 0 and |y|^2 = 1 twice,

.. math:: \ddot y = - H^\dagger \partial^2(\nabla L)(y)[\dot y, \dot y] - |\dot y|^2 y .

On a piece of at most one radian of curvature, the acceleration is a polynomial through its values
at 17 Chebyshev points, integrated twice and evaluated again until it stays. Both ends of a geodesic
can be given in place of its start and velocity: then the same iteration converges for geodesics
that turn by less than half a circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from manifold_sde.errors import ArgumentError
from manifold_sde.problem import Problem

#: What belongs to accelerations (n, k, D): positions and velocities (n, k, D).
Motion = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Chebyshev points of a piece, and its longest turn in radians.
_NODES, _PIECE = 17, 1.0
#: Largest change of an iterate that counts as none, and iterations until then.
_SETTLED, _ITERATIONS = 1e-12, 400
#: Weight of a new iterate where both ends are given: with it the iteration converges up to half a
#: circle, without it up to some two radians.
_DAMPED = 0.5
#: Change that shows that it does not settle.
_LOST = 10.0


def _integration() -> tuple[Tensor, Tensor, Tensor]:
    """Chebyshev points of [0, 1] (k,), and single and double integration from 0, (k, k)."""
    x = -np.cos(math.pi * np.arange(_NODES) / (_NODES - 1))
    coefficients = np.linalg.inv(chebyshev.chebvander(x, _NODES - 1))
    once = 0.5 * chebyshev.chebval(x, chebyshev.chebint(coefficients, lbnd=-1)).T
    return torch.from_numpy(0.5 * (x + 1.0)), torch.from_numpy(once), torch.from_numpy(once @ once)


_TIMES, _ONCE, _TWICE = _integration()


def acceleration(problem: Problem, y: Tensor, v: Tensor, rank: int) -> Tensor:
    """Acceleration of the geodesic through y with the velocity v, smooth around Gamma_1.

    Args:
        problem: The problem.
        y: Points at Gamma_1 (..., D).
        v: Tangent vectors (..., D).
        rank: Rank M of H.

    Returns:
        Tensor (..., D).
    """
    values, vectors = torch.linalg.eigh(problem.hessian(y))
    split = problem.dim - rank
    normal = vectors[..., split:]
    bend = normal.mT @ problem.third_derivative(y, v, v)[..., None]
    bend = (normal @ (bend / values[..., split:, None]))[..., 0]
    square = (v * v).sum(-1, keepdim=True) / (y * y).sum(-1, keepdim=True)
    return -bend - square * y


def follow_geodesic(problem: Problem, y: Tensor, v: Tensor, rank: int) -> Tensor:
    """The end of the geodesic from y with the velocity v after time 1: the exponential map.

    Args:
        problem: The problem.
        y: Points of Gamma_1 (n, D).
        v: Tangent vectors (n, D).
        rank: Rank M of H.

    Returns:
        Tensor (n, D), on Gamma_1 to about 1e-10.

    Raises:
        ArgumentError: If the iteration does not settle.
    """
    turn = acceleration(problem, y, v, rank).norm(dim=-1) / v.norm(dim=-1).clamp(min=1e-300)
    pieces = max(1, math.ceil(float(turn.max()) / _PIECE)) if len(y) else 1
    for _ in range(pieces):
        path, speed = _settle(problem, rank, _from_start(y, v / pieces), None, 1.0)
        y, v = path[:, -1], speed[:, -1] * pieces
    return y


def shoot_geodesic(problem: Problem, y: Tensor, z: Tensor, path: Tensor, rank: int) -> Tensor:
    """The velocity at y of the geodesic that is at z after time 1: the logarithm.

    Of several geodesics it is the one near the path that is given.

    Args:
        problem: The problem.
        y: Points of Gamma_1 (n, D).
        z: Points of Gamma_1 (n, D).
        path: A path from y to z at the times of :func:`geodesic_times`, (n, k, D).
        rank: Rank M of H.

    Returns:
        Tensor (n, D).

    Raises:
        ArgumentError: If the iteration does not settle: the geodesic turns by half a circle or
            more.
    """
    return _settle(problem, rank, _between(y, z), path, _DAMPED)[1][:, 0]


def geodesic_times() -> Tensor:
    """The times in [0, 1] at which a path is needed, (k,)."""
    return _TIMES


def _from_start(y: Tensor, v: Tensor) -> Motion:
    """Positions and velocities that belong to accelerations, from the start and its velocity."""
    times = _TIMES[:, None]
    start, velocity = y[:, None], v[:, None]
    return lambda bend: (start + times * velocity + _TWICE @ bend, velocity + _ONCE @ bend)


def _between(y: Tensor, z: Tensor) -> Motion:
    """Positions and velocities that belong to accelerations, from both ends."""

    def motion(bend: Tensor) -> tuple[Tensor, Tensor]:
        velocity = (z - y)[:, None] - (_TWICE @ bend)[:, -1:]
        position = y[:, None] + _TIMES[:, None] * velocity + _TWICE @ bend
        return position, velocity + _ONCE @ bend

    return motion


def _settle(
    problem: Problem, rank: int, motion: Motion, path: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """Positions and velocities (n, k, D) whose accelerations are those of a geodesic."""
    straight, speed = motion(torch.zeros(1, _NODES, problem.dim, dtype=torch.float64))
    speed = speed.expand(-1, _NODES, -1)
    path = straight if path is None else path
    changed = math.inf
    for _ in range(_ITERATIONS):
        new, new_speed = motion(acceleration(problem, path, speed, rank))
        changed = float((new - path).abs().max()) if new.numel() else 0.0
        path, speed = torch.lerp(path, new, weight), torch.lerp(speed, new_speed, weight)
        if not _SETTLED < changed < _LOST:
            path, speed = new, new_speed
            break
    if not changed <= 1e3 * _SETTLED:
        raise ArgumentError(
            "no geodesic was found",
            received=f"an iteration that still changes by {changed:.2g}",
            expected="points that a geodesic joins which turns by less than half a circle, or a "
            "shorter tangent vector",
            remedy="points that are closer together",
        )
    return path, speed
