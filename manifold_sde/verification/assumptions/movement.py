"""Moving along the manifold: small certain steps, and a search for the worst point."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manifold_sde.errors import PartialError
from manifold_sde.verification.subject import Subject

#: A step counts as one along the manifold where the way back to it is at most this part of it.
_CORRECTION = 0.25
#: Longest step of the search, in radians, and by how much it grows and shrinks.
_LONGEST, _GROW, _SHRINK = 0.3, 1.5, 0.4
#: Relative fall over a longest step below which a point counts as a minimum.
_STEEP = 1e-3

#: Function of points (n, D): values (n,), positive, and their gradients (n, D).
Valued = Callable[[Tensor], tuple[Tensor, Tensor]]


def retracted(subject: Subject, x: Tensor) -> Tensor:
    """Points of Gamma_1 near x by Newton's method, NaN where it does not arrive: (n, D)."""
    unit = x / x.norm(dim=1, keepdim=True)
    good = torch.isfinite(unit).all(1)
    y = torch.full_like(x, math.nan)
    if bool(good.any()):
        try:
            y[good] = subject.geometry.retract(unit[good])
        except PartialError as error:
            if error.partial is not None:
                y[good] = error.partial
    return y / y.norm(dim=1, keepdim=True)


def advance(subject: Subject, y: Tensor, move: Tensor) -> tuple[Tensor, Tensor]:
    """Step along Gamma_1, where it is seen to be one.

    Args:
        subject: The subject.
        y: Points of Gamma_1 (n, D).
        move: Tangent displacements (n, D).

    Returns:
        The new points (n, D), and whether the way back to the manifold was at most a quarter of
        the step (n,): a step that is bent more, or that has left for another sheet, is false.
    """
    there = y + move
    moved = retracted(subject, there)
    size = move.norm(dim=1)
    # The unit sphere takes size^2 / 2 back without any bend of the manifold in it.
    return moved, (moved - there / there.norm(dim=1, keepdim=True)).norm(dim=1) <= (
        _CORRECTION * size
    )


def along_manifold(subject: Subject, y: Tensor, v: Tensor) -> Tensor:
    """Part of vectors that is tangent to Gamma_1: (n, D), (n, D) -> (n, D)."""
    along = subject.geometry.tangent_projection(y, v)
    return along - y * (along * y).sum(1, keepdim=True)


def wander(
    subject: Subject, y: Tensor, use: int, steps: int, stride: float, *, adapting: bool = False
) -> Tensor:
    """Random walks on Gamma_1 in small steps, which do not leave a component.

    Args:
        subject: The subject.
        y: Points of Gamma_1 (n, D).
        use: Number of the random numbers.
        steps: Number K of steps; one that would leave the manifold is not made.
        stride: Length of a step.
        adapting: Whether a walk that a step would take off the manifold tries half the step next,
            and then longer ones again. It passes where the manifold is bent more.

    Returns:
        The points after each step, (K, n, D).
    """
    visited = []
    length = torch.full((len(y), 1), stride, dtype=y.dtype)
    for noise in subject.normals(use, steps, *y.shape):
        along = along_manifold(subject, y, noise)
        move = length * along / along.norm(dim=1, keepdim=True).clamp(min=1e-300)
        moved, good = advance(subject, y, move)
        y = torch.where(good[:, None], moved, y)
        if adapting:
            length = torch.where(good[:, None], (1.5 * length).clamp(max=stride), 0.5 * length)
        visited.append(y)
    return torch.stack(visited)


def descend(
    subject: Subject,
    function: Valued,
    starts: Tensor,
    rounds: int,
    keep: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Low values of a positive function on Gamma_1, and where they are.

    From each start, steps against the gradient that would take a linear function to zero, at most
    0.3 long, shortened where they do not lower it. A zero of finite order is approached
    geometrically, a minimum as far as the rounds reach.

    Args:
        subject: The subject.
        function: The function, with gradients along the manifold.
        starts: Points of Gamma_1 (n, D).
        rounds: Number of steps.
        keep: Which points count, (n, D) -> (n,).

    Returns:
        Points (n, D) and values (n,).
    """
    y = starts
    values, gradients = function(y)
    damping = torch.ones_like(values)
    for _ in range(rounds):
        slopes = gradients.norm(dim=1)
        lengths = (values / slopes.clamp(min=1e-300)).clamp(max=_LONGEST) * damping
        going = (slopes * _LONGEST > _STEEP * values) & (lengths > 1e-13)
        if not bool(going.any()):
            break
        move = -gradients / slopes.clamp(min=1e-300)[:, None] * lengths[:, None]
        tried = retracted(subject, (y + move)[going])
        good = torch.isfinite(tried).all(1)
        good[good.clone()] = keep(tried[good])
        rows = torch.nonzero(going)[:, 0]
        damping[rows[~good]] *= _SHRINK
        rows, tried = rows[good], tried[good]
        if not len(rows):
            continue
        new_values, new_gradients = function(tried)
        lower = new_values < values[rows]
        damping[rows] = torch.where(
            lower, (_GROW * damping[rows]).clamp(max=1.0), _SHRINK * damping[rows]
        )
        won = rows[lower]
        y = y.index_copy(0, won, tried[lower])
        values = values.index_copy(0, won, new_values[lower])
        gradients = gradients.index_copy(0, won, new_gradients[lower])
    return y, values
