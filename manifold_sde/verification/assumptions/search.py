"""The search for the worst point of the manifold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manifold_sde.verification.assumptions.survey import Survey
from manifold_sde.verification.sampling import retracted
from manifold_sde.verification.subject import Subject

#: Longest step of the search, in radians, and by how much it grows and shrinks.
_LONGEST, _GROW, _SHRINK = 0.3, 1.5, 0.4
#: Starts of a search.
_SEARCHES = 8
#: Relative fall over a longest step below which a point counts as a minimum.
_STEEP = 1e-3

#: Function of points (n, D): values (n,), positive, and their gradients (n, D).
Valued = Callable[[Tensor], tuple[Tensor, Tensor]]


def lowest(
    survey: Survey, function: Valued, points: Tensor, values: Tensor
) -> tuple[Tensor, float]:
    """The lowest value of a positive function that a search along Gamma_1 finds, and where.

    Args:
        survey: The survey, whose budget says how long it is searched.
        function: The function, with gradients along the manifold.
        points: Points of Gamma_1 (n, D).
        values: Values there (n,): the search starts at the lowest.

    Returns:
        Point (D,), and value.
    """
    rounds = 24 if survey.effort.points <= 64 else 60
    starts = points[values.argsort()[:_SEARCHES]]
    where, found = descend(survey.subject, function, starts, rounds, survey.on_level)
    index = int(found.argmin())
    return where[index], float(found[index])


def along_kernel(y: Tensor, kernel: Tensor, slope: Tensor) -> Tensor:
    """The part of gradients (n, D) in ker H (n, D, k) and orthogonal to y, (n, D)."""
    slope = (kernel @ (kernel.mT @ slope[..., None]))[..., 0]
    return slope - y * (slope * y).sum(1, keepdim=True)


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
        subject: The system under test.
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
        tried = retracted(subject.geometry, (y + move)[going])
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
